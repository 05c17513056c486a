"""Recall that needs the memory: facts, segments of filler, a question. Accuracy by the number of segments in between.

The examples are those of `data_prep.synthetic`, in the tokens of the evaluated model: `segments` segments of filler lie
between the last fact and the first question. An answer is correct if greedy decoding gives all of its tokens.
"""

import argparse
import hashlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean

from rich.table import Table

from data_prep.synthetic.examples import IntRange
from data_prep.synthetic.specs import parse_task
from data_prep.synthetic.tasks import Passkey, RecallTask
from infini_ds.data.batches import pad_documents
from infini_ds.distributed import collectives
from infini_ds.evaluation.model_loading import EvaluatedModel, has_memory
from infini_ds.evaluation.plots import Axes, memory_style, plt, save_figure
from infini_ds.evaluation.scoring import batches_by_length, greedy_answers, memory_settings
from infini_ds.evaluation.tables import MEMORY_LABELS, new_table
from infini_ds.evaluation.task import (
    DataFacts,
    EvaluationContext,
    EvaluationTask,
    Headline,
    TaskResult,
    TidyRow,
    integer,
    register_task,
)
from infini_ds.utils.progress import ProgressBar

DEFAULT_TASKS = ("passkey", "pairs,queries=4", "variables", "question,order=first", "question,order=last")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the passkey: the fraction of the filler before it
DEFAULT_SEGMENT = 128  # tokens in a segment, for models that have none
TITLE_WIDTH = 48  # characters in a line of a panel's title


@dataclass(frozen=True)
class Point:
    """One length and depth of a recall task: a fraction `depth` of the `segments` of filler is before the facts."""

    name: str
    task: RecallTask
    segments: int
    depth: float


@dataclass(frozen=True)
class Scores:
    """Accuracies at one point. tokens: of the longest example. data: SHA-256 of the examples' text."""

    tokens: int
    answers: int
    accuracy: dict[str, float]  # by setting of the memory
    data: str


@dataclass(frozen=True)
class ScoredPoint:
    """As `Point` and `Scores`."""

    segments: int
    depth: float
    tokens: int
    answers: int
    accuracy: dict[str, float]
    data: str


@dataclass(frozen=True)
class ScoredTask:
    """chance: the accuracy of guessing among the possible answers."""

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
class RecallResult(TaskResult):
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


def mean_accuracy(result: RecallResult) -> float:
    """Return the accuracy with the memory on, as the mean over tasks of the mean over their points."""
    return fmean(fmean(point.accuracy["on"] for point in task.points) for task in result.tasks.values())


@register_task
class Recall(EvaluationTask[RecallResult]):
    name = "recall"
    help = "accuracy by segments between fact and question, with the memory on, off, and that of another document"
    result_type = RecallResult

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        add = parser.add_argument
        add("--recall", nargs="+", default=DEFAULT_TASKS, metavar="TASK", help=f"(default: {' '.join(DEFAULT_TASKS)})")
        add(
            "--segments",
            type=integer("--segments", 0),
            nargs="+",
            default=[1, 4, 16, 64],
            help="segments of filler (default: 1 4 16 64)",
        )
        add(
            "--examples",
            type=integer("--examples", 2),
            default=64,
            help="of each task, length and depth (default: %(default)s)",
        )

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> RecallResult:
        given = context.arguments
        return evaluate_recall(model, given.recall, sorted(set(given.segments)), given.examples, context)

    def headline(self, result: RecallResult) -> Headline:
        return Headline("mean_accuracy", mean_accuracy(result))

    def table(self, result: RecallResult) -> Table:
        settings = list(next(iter(result.tasks.values())).points[0].accuracy)
        labels = [MEMORY_LABELS[setting] for setting in settings]
        table = new_table(
            f"recall: {result.examples} examples a line, segments of {result.segment_length} tokens",
            *("task", "segments between", "answers", *labels, "chance"),
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

    def plot(self, result: RecallResult, folder: Path) -> None:
        """Plot the accuracy by segments between fact and question, or by length and depth, one panel a task."""
        columns = min(3, len(result.tasks))
        rows = -(-len(result.tasks) // columns)
        figure, panels = plt.subplots(
            rows, columns, figsize=(4.2 * columns, 3.4 * rows + 0.6), squeeze=False, layout="constrained"
        )
        for axes, (name, task) in zip(panels.flat, result.tasks.items(), strict=False):
            axes.set_title(textwrap.fill(name.replace(",", ", "), TITLE_WIDTH), fontsize=10)
            (plot_depths if task.has_depths else plot_lengths)(axes, task)
        for axes in panels.flat[len(result.tasks) :]:
            axes.set_visible(False)
        with_curves = next((axes for axes in panels.flat if axes.get_legend_handles_labels()[0]), None)
        if with_curves is not None:
            figure.legend(*with_curves.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        save_figure(figure, folder / "recall.png")


def plot_lengths(axes: Axes, task: ScoredTask) -> None:
    """Plot the accuracy over the number of segments, one curve for each setting of the memory."""
    lengths = [point.segments for point in task.points]
    for setting in task.points[0].accuracy:
        values = [point.accuracy[setting] for point in task.points]
        axes.plot(range(len(lengths)), values, marker="o", markersize=4, **memory_style(setting))
    axes.axhline(task.chance, color="0.5", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set(ylim=(-0.03, 1.03), xlabel="segments between fact and question", ylabel="accuracy")


def plot_depths(axes: Axes, task: ScoredTask) -> None:
    """Plot the accuracy with the memory on as a grid of lengths and depths."""
    lengths = sorted({point.segments for point in task.points})
    depths = sorted({point.depth for point in task.points})
    accuracy = {(point.depth, point.segments): point.accuracy["on"] for point in task.points}
    grid = [[accuracy.get((depth, length), math.nan) for length in lengths] for depth in depths]
    axes.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "0.2")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.grid(visible=False)
    axes.set(xlabel="segments of filler in total", ylabel="filler before the fact")


def evaluate_recall(
    model: EvaluatedModel, names: Sequence[str], segments: Sequence[int], examples: int, context: EvaluationContext
) -> RecallResult:
    """Evaluate each task at each length.

    Args:
        names: recall tasks, as `data_prep.synthetic.specs.parse_task` reads them.
        segments: lengths of the filler.
        examples: at each point.
    Raises:
        UserError: a task is unknown, or the tokenizer splits every word of the filler.
    """
    S = model.model.config.segment_length if has_memory(model.model) else DEFAULT_SEGMENT
    points = [point for name in names for point in points_of(name, segments, S)]
    tasks: dict[str, ScoredTask] = {}
    with ProgressBar("recall", len(points), shown=collectives.is_rank_zero()) as progress:
        for point in points:
            options = {"task": repr(point.task), "segment_length": S, "examples": examples, "seed": context.seed}
            compute = partial(compute_scores, model, point.task, examples, context.seed, context.batch_tokens)
            scores = context.cache.get_or_compute(f"recall/{point.name}", options, Scores, compute)
            scored = ScoredPoint(point.segments, point.depth, **vars(scores))
            earlier = tasks.get(point.name, ScoredTask(point.task.chance, ()))
            tasks[point.name] = replace(earlier, points=(*earlier.points, scored))
            progress.advance({point.name: f"{scores.accuracy['on']:.3f}"})
    hashes = "".join(point.data for task in tasks.values() for point in task.points)
    data = DataFacts("generated by data_prep.synthetic", hashlib.sha256(hashes.encode()).hexdigest())
    return RecallResult(tasks, examples, S, data)


def points_of(name: str, segments: Sequence[int], segment_length: int) -> Iterator[Point]:
    """Yield the points of a recall task: one for each length, and for the passkey one for each length and depth."""
    task = parse_task(name)
    for number in segments:
        for depth in DEPTHS if isinstance(task, Passkey) and number else DEPTHS[:1]:
            before = round(depth * number * segment_length)
            after = number * segment_length - before
            placed = replace(task, distance=IntRange(after, after))
            yield Point(name, replace(placed, before=IntRange(before, before)) if before else placed, number, depth)


def compute_scores(model: EvaluatedModel, task: RecallTask, examples: int, seed: int, batch_tokens: int) -> Scores:
    """Compute the accuracy over all answers of some examples, in each setting of the memory."""
    tokenizer = model.tokenizer
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    tokenize = cache(lambda text: tokenizer.encode(text, add_special_tokens=False))
    drawn = [task.example(seed, index, tokenize) for index in range(examples)]
    rows = [start + example.tokens for example in drawn]
    answers = [[(len(start) + a.begin, len(start) + a.end) for a in example.answers] for example in drawn]
    batches = batches_by_length(list(map(len, rows)), batch_tokens)
    accuracy = {}
    for setting in memory_settings(model.model):
        correct = []
        for batch in collectives.split_across_ranks(batches):
            # The other document is the next example, which has other facts.
            partners = [(i + 1) % examples for i in batch] if setting == "other" else []
            both = pad_documents([rows[i] for i in batch + partners])
            own, other = both[: len(batch)], both[len(batch) :] if partners else None
            correct.append(greedy_answers(model.model, own, [answers[i] for i in batch], setting, other))
        gathered = collectives.gather_items(correct)
        accuracy[setting] = fmean(answer for batch in gathered for row in batch for answer in row)
    return Scores(
        tokens=max(map(len, rows)),
        answers=sum(map(len, answers)),
        accuracy=accuracy,
        data=hashlib.sha256("\n".join(example.text for example in drawn).encode()).hexdigest(),
    )
