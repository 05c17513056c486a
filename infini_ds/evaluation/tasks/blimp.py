"""BLiMP (Warstadt et al. 2020, arXiv:1912.00582): which of two sentences, one of them ungrammatical, is likelier?

Scored as lm-evaluation-harness does: the log-probability of the complete sentence after the start token, with a leading
space, not divided by its length; a tie is correct. The overall accuracy is the mean over paradigms. BabyLM's
supplement is a group of its own.
"""

import argparse
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from infini_ds.data.batches import batches_by_length, pad_documents
from infini_ds.distributed import collectives
from infini_ds.evaluation.minimal_pairs import Paradigm, read_paradigms
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.plots import MEMORY_COLORS, plt, save_figure
from infini_ds.evaluation.scoring import token_losses
from infini_ds.evaluation.tables import new_table
from infini_ds.evaluation.task import (
    DataFacts,
    EvaluationContext,
    EvaluationTask,
    Headline,
    TaskResult,
    TidyRow,
    register_task,
)
from infini_ds.utils.progress import ProgressBar

HUB_NAME = "nyu-mll/blimp"


@dataclass(frozen=True)
class Accuracy:
    """Of one paradigm."""

    accuracy: float


@dataclass(frozen=True)
class ParadigmScore:
    accuracy: float
    pairs: int
    phenomenon: str


@dataclass(frozen=True)
class CategoryScore:
    """accuracy: over all pairs of a category, as BabyLM's pipeline computes it."""

    accuracy: float
    pairs: int


@dataclass(frozen=True)
class SupplementResult:
    """accuracy: mean over the supplement's files."""

    accuracy: float
    paradigms: dict[str, ParadigmScore]

    @property
    def pairs(self) -> int:
        return _pairs(self.paradigms)


@dataclass(frozen=True)
class BlimpResult(TaskResult):
    """The supplement is in no other number.

    accuracy: mean over paradigms; over the supplement's, if no other files are given.
    phenomena: mean over the paradigms of each phenomenon.
    categories: accuracy over the pairs of each phenomenon.
    category_accuracy: mean of `categories`; on BabyLM's files the score of its pipeline.
    """

    accuracy: float
    phenomena: dict[str, float]
    paradigms: dict[str, ParadigmScore]
    data: DataFacts
    categories: dict[str, CategoryScore] = field(default_factory=dict)
    category_accuracy: float | None = None
    supplement: SupplementResult | None = None

    @property
    def pairs(self) -> int:
        return _pairs(self.paradigms)

    def tidy_rows(self) -> list[TidyRow]:
        rows = [TidyRow("on", "accuracy", self.accuracy), TidyRow("on", "pairs", self.pairs)]
        rows += [TidyRow("on", f"accuracy/{name}", accuracy) for name, accuracy in self.phenomena.items()]
        if self.category_accuracy is not None:
            rows.append(TidyRow("on", "category_accuracy", self.category_accuracy))
        if self.supplement is not None:
            rows.append(TidyRow("on", "supplement", self.supplement.accuracy))
            rows.append(TidyRow("on", "supplement_pairs", self.supplement.pairs))
            rows += [TidyRow("on", f"supplement/{name}", x.accuracy) for name, x in self.supplement.paradigms.items()]
        return rows


def _pairs(paradigms: dict[str, ParadigmScore]) -> int:
    return sum(paradigm.pairs for paradigm in paradigms.values())


@register_task
class Blimp(EvaluationTask[BlimpResult]):
    name = "blimp"
    help = "which of two sentences is grammatical, scored as lm-evaluation-harness does; --limit: pairs of a paradigm"
    result_type = BlimpResult

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        parser.add_argument(
            "--blimp",
            type=os.path.expanduser,
            default=HUB_NAME,
            help="folder of BLiMP's or BabyLM's files, or a dataset on the hub (default: %(default)s)",
        )

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> BlimpResult:
        path = context.arguments.blimp
        return evaluate_blimp(model, read_paradigms(path, context.limit), path, context)

    def headline(self, result: BlimpResult) -> Headline:
        return Headline("accuracy" if result.paradigms else "supplement", result.accuracy)

    def table(self, result: BlimpResult) -> Table:
        supplement = result.supplement
        table = new_table(
            f"BLiMP: {result.pairs:,} pairs" + (f", supplement: {supplement.pairs:,}" if supplement else ""),
            *("phenomenon", "paradigms", "pairs", "mean over paradigms", "over pairs"),
        )
        for name, accuracy in result.phenomena.items():
            paradigms = sum(paradigm.phenomenon == name for paradigm in result.paradigms.values())
            category = result.categories.get(name)
            over_pairs = (f"{category.pairs:,}", f"{category.accuracy:.3f}") if category else ("", "")
            table.add_row(_spaced(name), str(paradigms), over_pairs[0], f"{accuracy:.3f}", over_pairs[1])
        if result.paradigms:
            table.add_section()
            mean = "" if result.category_accuracy is None else f"{result.category_accuracy:.3f}"
            table.add_row("mean", str(len(result.paradigms)), f"{result.pairs:,}", f"{result.accuracy:.3f}", mean)
        if supplement:
            table.add_section()
            for name, score in supplement.paradigms.items():
                table.add_row(f"supplement: {_spaced(name)}", "1", f"{score.pairs:,}", *[f"{score.accuracy:.3f}"] * 2)
            mean, paradigms = f"{supplement.accuracy:.3f}", len(supplement.paradigms)
            table.add_row("supplement: mean", str(paradigms), f"{supplement.pairs:,}", mean, mean)
        return table

    def plot(self, result: BlimpResult, folder: Path) -> None:
        """Plot each phenomenon's mean accuracy as a bar, its paradigms as ticks on it, and the supplement below."""
        groups = [(result.phenomena, result.paradigms, "on")]
        if result.supplement is not None:
            scores = result.supplement.paradigms
            groups.insert(0, ({name: score.accuracy for name, score in scores.items()}, {}, "other"))
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * sum(len(means) for means, *_ in groups)))
        labels: list[str] = []
        for means, paradigms, kind in groups:
            color = MEMORY_COLORS[kind]
            for name in sorted(means, key=means.__getitem__):
                y = len(labels)
                ticks = [paradigm.accuracy for paradigm in paradigms.values() if paradigm.phenomenon == name]
                axes.barh(y, means[name], color=color, alpha=0.35, height=0.7)
                axes.plot(ticks, [y] * len(ticks), "|", color=color, markersize=9)
                axes.text(1.01, y, f"{means[name]:.2f}", va="center", fontsize=9)
                labels.append(_spaced(name) if kind == "on" else f"supplement: {_spaced(name)}")
        axes.axvline(0.5, color=MEMORY_COLORS["off"], linewidth=1)
        axes.text(0.5, len(labels) - 0.2, "chance", color=MEMORY_COLORS["off"], ha="center", va="bottom", fontsize=9)
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlim=(0, 1), xlabel="accuracy (bar: mean of a phenomenon; tick: a paradigm)")
        title = [f"BLiMP: {result.accuracy:.3f} over {len(result.paradigms)} paradigms"] if result.paradigms else []
        title += [f"supplement: {result.supplement.accuracy:.3f}"] if result.supplement else []
        axes.set_title(", ".join(title), pad=18)
        axes.grid(axis="y", visible=False)
        figure.tight_layout()
        save_figure(figure, folder / "blimp.png")


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def evaluate_blimp(
    model: EvaluatedModel, paradigms: Sequence[Paradigm], path: str, context: EvaluationContext
) -> BlimpResult:
    """Evaluate some paradigms, which were read from `path`."""
    blimp: dict[str, ParadigmScore] = {}
    supplement: dict[str, ParadigmScore] = {}
    with ProgressBar("blimp", len(paradigms), shown=collectives.is_rank_zero()) as progress:
        for paradigm in paradigms:
            compute = partial(compute_accuracy, model, paradigm, context.batch_tokens)
            options = {"data": paradigm.sha256()}
            part = f"blimp/supplement/{paradigm.name}" if paradigm.supplement else f"blimp/{paradigm.name}"
            found = context.cache.get_or_compute(part, options, Accuracy, compute)
            scores = supplement if paradigm.supplement else blimp
            scores[paradigm.name] = ParadigmScore(found.accuracy, len(paradigm.pairs), paradigm.phenomenon)
            progress.advance({"accuracy": f"{_mean([*blimp.values(), *supplement.values()]):.3f}"})
    phenomena: dict[str, list[ParadigmScore]] = {}
    for score in blimp.values():
        phenomena.setdefault(score.phenomenon, []).append(score)
    categories = {name: _over_pairs(scores) for name, scores in sorted(phenomena.items())}
    hashes = "".join(paradigm.sha256() for paradigm in paradigms)
    return BlimpResult(
        accuracy=_mean((blimp or supplement).values()),
        phenomena={name: _mean(scores) for name, scores in sorted(phenomena.items())},
        paradigms=blimp,
        data=DataFacts(path, hashlib.sha256(hashes.encode()).hexdigest()),
        categories=categories,
        category_accuracy=fmean(category.accuracy for category in categories.values()) if categories else None,
        supplement=SupplementResult(_mean(supplement.values()), supplement) if supplement else None,
    )


def _mean(scores: Iterable[ParadigmScore]) -> float:
    return fmean(score.accuracy for score in scores)


def _over_pairs(scores: Sequence[ParadigmScore]) -> CategoryScore:
    pairs = sum(score.pairs for score in scores)
    return CategoryScore(sum(round(score.accuracy * score.pairs) for score in scores) / pairs, pairs)


def compute_accuracy(model: EvaluatedModel, paradigm: Paradigm, batch_tokens: int) -> Accuracy:
    """Compute the fraction of pairs whose good sentence is at least as likely as its bad one."""
    rows = [sentence_ids(model.tokenizer, sentence) for pair in paradigm.pairs for sentence in pair]
    batches = batches_by_length(list(map(len, rows)), batch_tokens)
    losses = [
        token_losses(model.model, pad_documents([rows[i] for i in batch])).double().sum(1).tolist()
        for batch in collectives.split_across_ranks(batches)
    ]
    log_p = [0.0] * len(rows)
    for batch, of_batch in zip(batches, collectives.gather_items(losses), strict=True):
        for index, loss in zip(batch, of_batch, strict=True):
            log_p[index] = -loss
    return Accuracy(fmean(good >= bad for good, bad in zip(log_p[::2], log_p[1::2], strict=True)))


def sentence_ids(tokenizer: PreTrainedTokenizerBase, sentence: str) -> list[int]:
    """Return the start token (or the end token, if there is no start token) and the tokens of a sentence.

    As lm-evaluation-harness does, with the space that its `target_delimiter` puts before the sentence.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = tokenizer.encode(f" {sentence}", add_special_tokens=False)
    return ids if ids[0] == start else [start, *ids]
