"""Natural recall: what the memory is worth where a text repeats itself, on any corpus and without synthetic examples.

A token that completes a bigram which its document had before can be recalled: after "Harry" the text once went on with
"Potter", and now it does again (the "associative recall hits" of Arora et al. 2023, arXiv:2312.04927). The loss on
these tokens, by the number of segments since the bigram occurred last, stands beside that on tokens with a new bigram.

Shapes: B rows, T tokens in a row, C classes of distance.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from infini_ds.distributed import collectives
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.plots import memory_style, plt, save_figure
from infini_ds.evaluation.tables import MEMORY_LABELS, new_table
from infini_ds.evaluation.task import (
    DataFacts,
    EvaluationContext,
    EvaluationTask,
    Headline,
    TaskResult,
    TidyRow,
    register_task,
)
from infini_ds.evaluation.validation_rows import ChosenRows, Gain, rows_of_options
from infini_ds.utils.errors import UserError

NEW = 0  # the class of bigrams that the document did not have before; 1 is the same segment, 2 the one before it


@dataclass(frozen=True)
class SummedLosses:
    """In one setting of the memory, for each row and class: the sum of the losses, and the number of tokens."""

    loss: tuple[tuple[float, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Repetitions:
    """Tokens whose bigram occurred last `nearest` to `farthest` segments before; None: never.

    loss: by setting of the memory. gained: by setting, without "on".
    """

    nearest: int | None
    farthest: int | None
    tokens: int
    loss: dict[str, float]
    gained: dict[str, Gain]

    @property
    def label(self) -> str:
        if self.nearest is None:
            return "new"
        return str(self.nearest) if self.nearest == self.farthest else f"{self.nearest}-{self.farthest}"


@dataclass(frozen=True)
class NaturalRecallResult(TaskResult):
    """new: tokens whose bigram is new. seen: the others by distance. remembered: all of distance 1 or more."""

    data: DataFacts
    rows: int
    sequence_length: int
    segment_length: int
    new: Repetitions
    seen: tuple[Repetitions, ...]
    remembered: Repetitions

    def tidy_rows(self) -> list[TidyRow]:
        named = [("new", self.new), ("remembered", self.remembered)]
        named += [(f"{repetitions.label}_segments", repetitions) for repetitions in self.seen]
        rows = []
        for name, repetitions in named:
            rows += [TidyRow(setting, f"loss/{name}", loss) for setting, loss in repetitions.loss.items()]
            rows += [TidyRow(setting, f"gain/{name}", gain.mean) for setting, gain in repetitions.gained.items()]
        return rows


@register_task
class NaturalRecall(EvaluationTask[NaturalRecallResult]):
    name = "natural_recall"
    help = (
        "loss on tokens that complete a bigram of their document, by segments since then, on the rows that --data and "
        "--rows of position choose, and in its --segment-tokens"
    )
    result_type = NaturalRecallResult

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> NaturalRecallResult:
        return evaluate_natural_recall(rows_of_options(model, context.arguments), context)

    def headline(self, result: NaturalRecallResult) -> Headline:
        return Headline("loss/remembered", result.remembered.loss["on"])

    def table(self, result: NaturalRecallResult) -> Table:
        settings = list(result.new.loss)
        gains = [f"gain over {MEMORY_LABELS[setting]}" for setting in result.new.gained]
        table = new_table(
            f"natural recall: {result.rows} rows of {result.sequence_length:,} tokens, segments of "
            f"{result.segment_length}",
            *("segments since the bigram", "tokens", *(MEMORY_LABELS[setting] for setting in settings), *gains),
        )

        def add(label: str, group: Repetitions) -> None:
            losses = [f"{group.loss[setting]:.4f}" for setting in settings]
            table.add_row(label, f"{group.tokens:,}", *losses, *map(str, group.gained.values()))

        for group in result.seen:
            add({"0": "0: the same segment"}.get(group.label, group.label), group)
        table.add_section()
        add("1 or more", result.remembered)
        add("the bigram is new", result.new)
        return table

    def plot(self, result: NaturalRecallResult, folder: Path) -> None:
        """Plot the loss by distance, and the gain of the memory by distance, one curve for each setting."""
        figure, (losses, gains) = plt.subplots(1, 2, figsize=(12, 4.5))
        places, labels = range(len(result.seen)), [group.label for group in result.seen]
        for setting in result.new.loss:
            style = memory_style(setting)
            losses.plot(places, [group.loss[setting] for group in result.seen], marker="o", markersize=4, **style)
            losses.axhline(result.new.loss[setting], color=style["color"], linestyle=":", linewidth=1)
        for setting in result.new.gained:
            style = memory_style(setting)
            for x, groups, marker in ((places, result.seen, "o"), ([len(labels)], (result.new,), "s")):
                means = [group.gained[setting].mean for group in groups]
                errors = [group.gained[setting].standard_error or 0.0 for group in groups]
                gains.errorbar(x, means, errors, color=style["color"], marker=marker, markersize=4, capsize=2)
        gains.axhline(0, color="0.6", linewidth=0.8)
        losses.set_xticks(places, labels)
        gains.set_xticks([*places, len(labels)], [*labels, "new"])
        losses.set(
            xlabel="segments since the bigram occurred", ylabel="loss (nats a token)", title="loss; dotted: new bigrams"
        )
        gains.set(
            xlabel="segments since the bigram occurred",
            ylabel="gain (nats a token)",
            title="gain of the own memory (± 1 s.e.)",
        )
        figure.legend(*losses.get_legend_handles_labels(), loc="lower center", ncols=3)
        figure.suptitle(f"Natural recall, {result.rows} rows", fontsize=12)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        save_figure(figure, folder / "natural_recall.png")


def evaluate_natural_recall(rows: ChosenRows, context: EvaluationContext) -> NaturalRecallResult:
    """Evaluate rows in each setting of the memory.

    Raises:
        UserError: no bigram of a row is repeated in a later segment.
    """
    sums = {}
    for setting in rows.settings():
        compute = partial(compute_sums, rows, setting, context.batch_tokens)
        sums[setting] = context.cache.get_or_compute(
            f"natural_recall/{setting}", rows.cache_key(), SummedLosses, compute
        )
    tokens = torch.tensor(sums["on"].tokens, dtype=torch.float64)  # (rows, C)
    losses = {setting: torch.tensor(found.loss, dtype=torch.float64) for setting, found in sums.items()}
    classes = [c for c in range(1, tokens.shape[1]) if tokens[:, c].sum()]
    if not tokens[:, 2:].sum():
        raise UserError(
            f"--data {rows.data.path}: no bigram of the {len(rows.chosen)} rows is repeated after a segment of "
            f"{rows.segment_length} tokens: prepare rows of more tokens, with --sequence-length of data_prep, or "
            "count distances in shorter segments, with --segment-tokens"
        )
    farthest = tokens.shape[1] - 1
    return NaturalRecallResult(
        data=rows.data,
        rows=len(rows.chosen),
        sequence_length=rows.sequence_length,
        segment_length=rows.segment_length,
        new=summarize(tokens, losses, [NEW], None, None),
        seen=tuple(summarize(tokens, losses, [c], *distances_of_class(c)) for c in classes),
        remembered=summarize(tokens, losses, list(range(2, farthest + 1)), 1, distances_of_class(farthest)[1]),
    )


def compute_sums(rows: ChosenRows, memory: str, batch_tokens: int) -> SummedLosses:
    """Sum up losses by row and class in one setting of the memory, with the rows split across ranks."""
    S, T = rows.segment_length, rows.sequence_length
    C = int(classes_of_distances(torch.tensor([-(-T // S) - 1]))) + 1
    of_batches = []
    for batch, losses, predicted in rows.losses("natural recall", memory, batch_tokens):
        distances, inside = bigram_distances(batch.input_ids, batch.full_document_ids(), S)
        counted = (predicted & inside).double()
        index = classes_of_distances(distances)
        empty = torch.zeros(len(index), C, dtype=torch.float64)
        sums = [empty.scatter_add(1, index, x) for x in (losses * counted, counted)]
        of_batches.append([sums[0].tolist(), sums[1].long().tolist()])
    gathered = collectives.gather_items(of_batches)
    loss, tokens = (tuple(tuple(row) for batch in gathered for row in batch[which]) for which in (0, 1))
    return SummedLosses(loss, tokens)


def bigram_distances(ids: Tensor, documents: Tensor, segment_length: int) -> tuple[Tensor, Tensor]:
    """Return for each token after the first how many segments ago its bigram occurred last, -1 for never.

    Args:
        ids, documents: (B, T) tokens and their documents. A bigram is a token and the one before it in its document.
    Returns:
        distances: (B, T - 1) int64.
        inside: bool (B, T - 1), whether the token has one before it in its document.
    """
    V, T = int(ids.max()) + 1, ids.shape[1]
    inside = documents[:, 1:] == documents[:, :-1]
    keys = (documents[:, 1:].long() * V + ids[:, :-1]) * V + ids[:, 1:]
    keys = torch.where(inside, keys, -1 - torch.arange(T - 1))  # the first token of a document has a key of its own
    ordered, order = keys.sort(dim=1, stable=True)  # equal bigrams side by side, in the order of the text
    repeated = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    earlier = torch.where(repeated, order.roll(1, dims=1), -1)
    last = torch.full_like(order, -1).scatter(1, order, earlier)  # of the token that completed the bigram, less 1
    at = torch.arange(1, T)
    return torch.where(last >= 0, at // segment_length - (last + 1) // segment_length, -1), inside


def classes_of_distances(distances: Tensor) -> Tensor:
    """Return the class of each distance: NEW for -1, 1 for 0, and then one for 1, 2, 3-4, 5-8, and so on."""
    octave = distances.clamp_min(1).double().log2().ceil().long() + 2
    return torch.where(distances < 1, distances + 1, octave)


def distances_of_class(number: int) -> tuple[int, int]:
    """Return the nearest and the farthest distance of a class of bigrams that were seen."""
    if number < 3:
        return number - 1, number - 1
    return 2 ** (number - 3) + 1, 2 ** (number - 2)


def summarize(
    tokens: Tensor, losses: dict[str, Tensor], classes: list[int], nearest: int | None, farthest: int | None
) -> Repetitions:
    """Return the mean losses over some classes, and the memory's gain with its standard error over rows.

    Args:
        tokens: (rows, C) numbers of tokens; losses: by setting of the memory, their sums (rows, C).
    """
    n = tokens[:, classes].sum(1)
    sums = {setting: loss[:, classes].sum(1) for setting, loss in losses.items()}
    total = n.sum().item()
    gained = {}
    for setting, loss in sums.items():
        if setting != "on" and total:
            difference = loss - sums["on"]
            mean = difference.sum().item() / total
            # Of a ratio of sums over rows, which are independent, while tokens of a row are not.
            R, error = len(n), None
            if R > 1:
                error = math.sqrt(((difference - mean * n) ** 2).sum().item() * R / (R - 1)) / total
            gained[setting] = Gain(mean, error)
    means = {setting: loss.sum().item() / max(1.0, total) for setting, loss in sums.items()}
    return Repetitions(nearest, farthest, int(total), means, gained)
