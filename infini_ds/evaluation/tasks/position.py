"""Loss by position on long documents, with the memory on, off, and with that of another document.

If the memory of another document lowers the loss as much, the memory carries style and not content.
"""

import argparse
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Group
from torch import Tensor

from infini_ds.distributed import collectives
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.plots import memory_style, plt, save_figure
from infini_ds.evaluation.tables import MAX_LINES, MEMORY_LABELS, new_table
from infini_ds.evaluation.task import (
    DataFacts,
    EvaluationContext,
    EvaluationTask,
    Headline,
    TaskResult,
    TidyRow,
    add_integer,
    register_task,
)
from infini_ds.evaluation.validation_rows import ChosenRows, Gain, rows_of_options
from infini_ds.training.validation import PositionLosses

MAX_POINTS = 256  # of the loss by position
MAX_MARKERS = 128  # points of a curve that has markers


@dataclass(frozen=True)
class SegmentLosses:
    """Means over the tokens of each segment of the row."""

    loss: tuple[float, ...]
    perplexity: tuple[float, ...]


@dataclass(frozen=True)
class BinnedLosses:
    """Mean loss of up to MAX_POINTS bins of positions. position: the middle of each bin."""

    position: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class PlaceLosses:
    """Mean loss at each position in a segment, over all segments except the first, which has no memory to read."""

    loss: tuple[float, ...]


@dataclass(frozen=True)
class Losses:
    """The losses in one setting of the memory. tokens: that were predicted. by_row: the mean of each row."""

    loss: float
    perplexity: float
    tokens: int
    by_segment: SegmentLosses
    by_position: BinnedLosses
    within_segment: PlaceLosses
    by_row: tuple[float, ...]


@dataclass(frozen=True)
class PositionResult(TaskResult):
    """rows: evaluated. memory: by setting of the memory. gained: by setting, without "on"."""

    data: DataFacts
    rows: int
    sequence_length: int
    segment_length: int
    memory: dict[str, Losses]
    gained: dict[str, Gain]

    def tidy_rows(self) -> list[TidyRow]:
        rows = []
        for setting, losses in self.memory.items():
            rows.append(TidyRow(setting, "loss", losses.loss))
            if gain := self.gained.get(setting):
                rows.append(TidyRow(setting, "gain", gain.mean))
            by_segment = enumerate(losses.by_segment.loss, start=1)
            rows += [TidyRow(setting, f"loss/segment_{segment}", loss) for segment, loss in by_segment]
        return rows


@register_task
class Position(EvaluationTask[PositionResult]):
    name = "position"
    help = "loss by position on long documents, with the memory on, off, and that of another document"
    result_type = PositionResult

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        parser.add_argument(
            "--data",
            type=os.path.expanduser,
            help="folder that data_prep made, or its address (default: the run's own data)",
        )
        add_integer(parser, "--rows", 0, 64, "validation rows, evenly spaced over the split; 0 for all")
        grouped = "tokens of a segment in tables and plots, to compare models whose segments differ"
        add_integer(parser, "--segment-tokens", 0, 0, grouped, shown="the model's")

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> PositionResult:
        return evaluate_position(rows_of_options(model, context.arguments), context)

    def headline(self, result: PositionResult) -> Headline:
        return Headline("loss", result.memory["on"].loss)

    def table(self, result: PositionResult) -> Group:
        title = f"loss by position: {result.rows} rows of {result.sequence_length:,} tokens"
        overall = new_table(title, "", "loss", "perplexity", "gain of memory on")
        for memory, losses in result.memory.items():
            gain = result.gained.get(memory)
            shown = str(gain) if gain else ""
            overall.add_row(MEMORY_LABELS[memory], f"{losses.loss:.4f}", f"{losses.perplexity:.2f}", shown)
        labels = [MEMORY_LABELS[memory] for memory in result.memory]
        by_segment = new_table(f"loss by segment of {result.segment_length} tokens", "segment", *labels)
        segments = len(result.memory["on"].by_segment.loss)
        for segment in range(0, segments, -(-segments // MAX_LINES)):
            shown_losses = [f"{losses.by_segment.loss[segment]:.4f}" for losses in result.memory.values()]
            by_segment.add_row(str(segment + 1), *shown_losses)
        return Group(overall, by_segment)

    def plot(self, result: PositionResult, folder: Path) -> None:
        """Plot the loss by segment and the loss by position in a segment, one curve for each setting of the memory."""
        figure, (along, within) = plt.subplots(1, 2, figsize=(12, 4.5), gridspec_kw={"width_ratios": [3, 2]})
        S = result.segment_length
        for memory, losses in result.memory.items():
            style, by_segment = memory_style(memory), losses.by_segment.loss
            middles = [S * (segment + 0.5) for segment in range(len(by_segment))]
            along.plot(middles, by_segment, marker="." if len(middles) <= MAX_MARKERS else "", markersize=5, **style)
            by_place = losses.within_segment.loss
            within.plot(range(1, len(by_place) + 1), by_place, linewidth=1.2, color=style["color"])
        along.set(
            xlabel="position in the row (tokens)", ylabel="loss (nats a token)", title=f"by segment of {S} tokens"
        )
        within.set(xlabel="position in the segment (tokens)", title="within a segment, without the first one")
        figure.legend(loc="lower center", ncols=3)
        figure.suptitle(f"Loss by position, {result.rows} rows", fontsize=12)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        save_figure(figure, folder / "position.png")


def evaluate_position(rows: ChosenRows, context: EvaluationContext) -> PositionResult:
    """Evaluate rows in each setting of the memory."""
    memory = {}
    for setting in rows.settings():
        compute = partial(compute_losses, rows, setting, context.batch_tokens)
        memory[setting] = context.cache.get_or_compute(f"position/{setting}", rows.cache_key(), Losses, compute)
    return PositionResult(
        data=rows.data,
        rows=len(rows.chosen),
        sequence_length=rows.sequence_length,
        segment_length=rows.segment_length,
        memory=memory,
        gained={setting: gain(memory["on"], losses) for setting, losses in memory.items() if setting != "on"},
    )


def compute_losses(rows: ChosenRows, memory: str, batch_tokens: int) -> Losses:
    """Compute the losses in one setting of the memory, with the rows split across ranks."""
    total, by_row = torch.zeros(2, rows.sequence_length - 1, dtype=torch.float64), []
    for _, losses, predicted in rows.losses("position", memory, batch_tokens):
        count = predicted.double()
        total += torch.stack([losses.sum(0), count.sum(0)])
        by_row.append((losses.sum(1) / count.sum(1).clamp_min(1)).tolist())
    summed = PositionLosses(*collectives.all_reduce_sum(total))
    means = [mean for of_batch in collectives.gather_items(by_row) for mean in of_batch]
    return summarize(summed, means, rows.segment_length)


def summarize(losses: PositionLosses, by_row: list[float], segment_length: int) -> Losses:
    """Return the means over everything, segments, bins of positions, and positions in a segment."""
    _, by_segment = bin_means(losses, segment_length)
    middles, by_position = bin_means(losses, -(-len(losses.loss) // MAX_POINTS))
    return Losses(
        loss=losses.mean,
        perplexity=math.exp(losses.mean),
        tokens=int(losses.count.sum()),
        by_segment=SegmentLosses(tuple(by_segment), tuple(math.exp(loss) for loss in by_segment)),
        by_position=BinnedLosses(tuple(middles), tuple(by_position)),
        within_segment=PlaceLosses(tuple(means_within_segment(losses, segment_length))),
        by_row=tuple(by_row),
    )


def bin_means(losses: PositionLosses, width: int) -> tuple[list[float], list[float]]:
    """Return the middles and the mean losses of bins of `width` positions, without bins of ignored tokens only."""
    middles, means = [], []
    for first in range(0, len(losses.loss), width):
        count = losses.count[first : first + width].sum()
        if count:
            middles.append(first + min(width, len(losses.loss) - first) / 2)
            means.append((losses.loss[first : first + width].sum() / count).item())
    return middles, means


def means_within_segment(losses: PositionLosses, segment_length: int) -> list[float]:
    """Return the mean loss at each position in a segment, over all segments except the first."""
    S = segment_length

    def sum_over_segments(x: Tensor) -> Tensor:
        x = x[S:]
        return torch.nn.functional.pad(x, (0, -len(x) % S)).view(-1, S).sum(0)

    count = sum_over_segments(losses.count)
    return (sum_over_segments(losses.loss) / count)[count > 0].tolist()


def gain(on: Losses, other: Losses) -> Gain:
    """Return by how much the loss is lower with the memory on than in another setting."""
    gains = torch.tensor(other.by_row, dtype=torch.float64) - torch.tensor(on.by_row, dtype=torch.float64)
    error = gains.std() / math.sqrt(len(gains)) if len(gains) > 1 else None
    return Gain(gains.mean().item(), None if error is None else error.item())
