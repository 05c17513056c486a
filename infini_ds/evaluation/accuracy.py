"""Accuracy of answers by length and depth, in each setting of the memory: what all tasks that ask for facts share."""

import hashlib
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from rich.console import RenderableType
from rich.table import Table

from infini_ds.distributed import collectives
from infini_ds.evaluation.plots import Axes, memory_style, plt, save_figure
from infini_ds.evaluation.tables import MEMORY_LABELS, new_table
from infini_ds.evaluation.task import (
    DataFacts,
    EvaluationContext,
    EvaluationTask,
    Headline,
    TaskResult,
    TidyRow,
)
from infini_ds.utils.progress import ProgressBar

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # the fraction of the text before the fact
TITLE_WIDTH = 48  # characters in a line of a panel's title


@dataclass(frozen=True)
class Scores:
    """Accuracies at one point. tokens: of the longest example. data: SHA-256 of the examples' text."""

    tokens: int
    answers: int
    accuracy: dict[str, float]  # by setting of the memory
    data: str


@dataclass(frozen=True)
class ScoredPoint:
    """The scores at one length and depth: a fraction `depth` of the `segments` of text is before the facts."""

    segments: int
    depth: float
    tokens: int
    answers: int
    accuracy: dict[str, float]
    data: str


@dataclass(frozen=True)
class ScoredTask:
    """chance: the accuracy of an answer that does not depend on the facts: a guess, or the most frequent answer."""

    chance: float
    points: tuple[ScoredPoint, ...]

    @property
    def has_depths(self) -> bool:
        return len({point.depth for point in self.points}) > 1

    def by_segments(self) -> dict[int, list[ScoredPoint]]:
        """Return the points of each number of segments: one for each depth."""
        grouped: dict[int, list[ScoredPoint]] = {}
        for point in self.points:
            grouped.setdefault(point.segments, []).append(point)
        return grouped


@dataclass(frozen=True)
class AccuracyResult(TaskResult):
    """tasks: by name. examples: at each point."""

    tasks: dict[str, ScoredTask]
    examples: int
    segment_length: int
    data: DataFacts

    def tidy_rows(self) -> list[TidyRow]:
        rows = [TidyRow("on", "mean_accuracy", mean_accuracy(self))]
        for name, task in self.tasks.items():
            for point in task.points:
                metric = f"accuracy/{name}/{point.segments}_segments/depth_{point.depth:g}"
                rows += [TidyRow(setting, metric, value) for setting, value in point.accuracy.items()]
        return rows


def mean_accuracy(result: AccuracyResult) -> float:
    """Return the accuracy with the memory on, as the mean over tasks of the mean over their points."""
    return fmean(fmean(point.accuracy["on"] for point in task.points) for task in result.tasks.values())


@dataclass(frozen=True)
class Point:
    """What is scored at one length and depth.

    name: of the task. chance: as in `ScoredTask`.
    options: all that the scores depend on besides the model and the arguments of `score_points`.
    compute: every rank calls it, and all get the same scores.
    """

    name: str
    segments: int
    depth: float
    chance: float
    options: dict[str, Any]
    compute: Callable[[], Scores]


def score_points(
    task: str, points: Sequence[Point], context: EvaluationContext, examples: int, segment_length: int, source: str
) -> AccuracyResult:
    """Score all points, those that earlier calls have finished excepted.

    Args:
        task: name of the evaluation task. source: where its data are from.
    """
    tasks: dict[str, ScoredTask] = {}
    shared = {"segment_length": segment_length, "examples": examples, "seed": context.seed}
    with ProgressBar(task, len(points), shown=collectives.is_rank_zero()) as progress:
        for point in points:
            part, options = f"{task}/{point.name}", point.options | shared
            scores = context.cache.get_or_compute(part, options, Scores, point.compute)
            scored = ScoredPoint(point.segments, point.depth, **vars(scores))
            earlier = tasks.get(point.name, ScoredTask(point.chance, ()))
            tasks[point.name] = replace(earlier, points=(*earlier.points, scored))
            progress.advance({point.name: f"{scores.accuracy['on']:.3f}"})
    hashes = "".join(point.data for task in tasks.values() for point in task.points)
    data = DataFacts(source, hashlib.sha256(hashes.encode()).hexdigest())
    return AccuracyResult(tasks, examples, segment_length, data)


class AccuracyTask(EvaluationTask[AccuracyResult]):
    """A task whose result is an accuracy by length, and perhaps by depth.

    Attributes:
        lengths: what the number of segments counts, for the table and the plot.
        baseline: what `ScoredTask.chance` is.
    """

    result_type = AccuracyResult
    lengths: ClassVar[str]
    baseline: ClassVar[str] = "chance"

    def headline(self, result: AccuracyResult) -> Headline:
        return Headline("mean_accuracy", mean_accuracy(result))

    def table(self, result: AccuracyResult) -> RenderableType:
        return self.table_by_length(result)

    def table_by_length(self, result: AccuracyResult) -> Table:
        """Return a line for each task and length, means over depths."""
        settings = list(next(iter(result.tasks.values())).points[0].accuracy)
        labels = [MEMORY_LABELS[setting] for setting in settings]
        table = new_table(
            f"{self.name}: {result.examples} examples a line, segments of {result.segment_length} tokens",
            *("task", self.lengths, "answers", *labels, self.baseline),
        )
        for name, task in result.tasks.items():
            table.add_section()
            for segments, points in task.by_segments().items():
                depths = f" in total, {len(points)} depths" if len(points) > 1 else ""
                answers = sum(point.answers for point in points)
                means = [fmean(point.accuracy[setting] for point in points) for setting in settings]
                shown = [f"{mean:.3f}" for mean in means]
                table.add_row(name, f"{segments}{depths}", str(answers), *shown, f"{task.chance:.3g}")
                name = ""  # on the first line of each task only
        return table

    def plot(self, result: AccuracyResult, folder: Path) -> None:
        """Plot the accuracy by segments between fact and question, or by length and depth, one panel a task."""
        columns = min(3, len(result.tasks))
        rows = -(-len(result.tasks) // columns)
        figure, panels = plt.subplots(
            rows, columns, figsize=(4.2 * columns, 3.4 * rows + 0.6), squeeze=False, layout="constrained"
        )
        for axes, (name, task) in zip(panels.flat, result.tasks.items(), strict=False):
            axes.set_title(textwrap.fill(name.replace(",", ", "), TITLE_WIDTH), fontsize=10)
            if task.has_depths:
                plot_depths(axes, task)
            else:
                plot_lengths(axes, task, self.lengths, self.baseline)
        for axes in panels.flat[len(result.tasks) :]:
            axes.set_visible(False)
        with_curves = next((axes for axes in panels.flat if axes.get_legend_handles_labels()[0]), None)
        if with_curves is not None:
            figure.legend(*with_curves.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        save_figure(figure, folder / f"{self.name}.png")


def plot_lengths(axes: Axes, task: ScoredTask, lengths_label: str, baseline: str) -> None:
    """Plot the accuracy over the number of segments, one curve for each setting of the memory."""
    lengths = [point.segments for point in task.points]
    for setting in task.points[0].accuracy:
        values = [point.accuracy[setting] for point in task.points]
        axes.plot(range(len(lengths)), values, marker="o", markersize=4, **memory_style(setting))
    axes.axhline(task.chance, color="0.5", linestyle="--", linewidth=1, label=baseline)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set(ylim=(-0.03, 1.03), xlabel=lengths_label, ylabel="accuracy")


def plot_depths(axes: Axes, task: ScoredTask, setting: str = "on") -> None:
    """Plot the accuracy in a setting of the memory as a grid of lengths and depths."""
    lengths = sorted({point.segments for point in task.points})
    depths = sorted({point.depth for point in task.points})
    accuracy = {(point.depth, point.segments): point.accuracy[setting] for point in task.points}
    grid = [[accuracy.get((depth, length), math.nan) for length in lengths] for depth in depths]
    axes.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "0.2")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.grid(visible=False)
    axes.set(xlabel="segments of text in total", ylabel="text before the fact")
