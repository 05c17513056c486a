"""BLiMP (Warstadt et al. 2020, arXiv:1912.00582): which of two sentences, one of them ungrammatical, is likelier?

Scored as lm-evaluation-harness does: the log-probability of the complete sentence after the start token, with a leading
space, not divided by its length; a tie is correct. The overall accuracy is the mean over paradigms.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from infini_ds.data.batches import pad_documents
from infini_ds.distributed import collectives
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.plots import MEMORY_COLORS, plt, save_figure
from infini_ds.evaluation.scoring import batches_by_length, token_losses
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
from infini_ds.utils.errors import UserError, first_line
from infini_ds.utils.hashing import sha256_of_json
from infini_ds.utils.progress import ProgressBar

HUB_NAME = "nyu-mll/blimp"


class Paradigm(NamedTuple):
    """phenomenon: `linguistics_term` of the data. pairs: (good, bad) sentences."""

    name: str
    phenomenon: str
    pairs: list[tuple[str, str]]

    def sha256(self) -> str:
        return sha256_of_json(self.pairs)


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
class BlimpResult(TaskResult):
    """accuracy: mean over paradigms. phenomena: mean over the paradigms of each phenomenon."""

    accuracy: float
    phenomena: dict[str, float]
    paradigms: dict[str, ParadigmScore]
    data: DataFacts

    @property
    def pairs(self) -> int:
        return sum(paradigm.pairs for paradigm in self.paradigms.values())

    def tidy_rows(self) -> list[TidyRow]:
        phenomena = [TidyRow("on", f"accuracy/{name}", accuracy) for name, accuracy in self.phenomena.items()]
        return [TidyRow("on", "accuracy", self.accuracy), TidyRow("on", "pairs", self.pairs), *phenomena]


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
            help="folder of JSONL files, or a dataset on the hub (default: %(default)s)",
        )

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> BlimpResult:
        path = context.arguments.blimp
        return evaluate_blimp(model, read_paradigms(path, context.limit), path, context)

    def headline(self, result: BlimpResult) -> Headline:
        return Headline("accuracy", result.accuracy)

    def table(self, result: BlimpResult) -> Table:
        table = new_table(f"BLiMP: {result.pairs:,} pairs", "phenomenon", "paradigms", "accuracy")
        for name, accuracy in result.phenomena.items():
            paradigms = sum(paradigm.phenomenon == name for paradigm in result.paradigms.values())
            table.add_row(name.replace("_", " "), str(paradigms), f"{accuracy:.3f}")
        table.add_section()
        table.add_row("all, mean over paradigms", str(len(result.paradigms)), f"{result.accuracy:.3f}")
        return table

    def plot(self, result: BlimpResult, folder: Path) -> None:
        """Plot the mean accuracy of each phenomenon as a bar, and its paradigms as ticks on it."""
        means, color = result.phenomena, MEMORY_COLORS["on"]
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * len(means)))
        names = sorted(means, key=means.__getitem__)
        for y, name in enumerate(names):
            accuracies = [paradigm.accuracy for paradigm in result.paradigms.values() if paradigm.phenomenon == name]
            axes.barh(y, means[name], color=color, alpha=0.35, height=0.7)
            axes.plot(accuracies, [y] * len(accuracies), "|", color=color, markersize=9)
            axes.text(1.01, y, f"{means[name]:.2f}", va="center", fontsize=9)
        axes.axvline(0.5, color=MEMORY_COLORS["off"], linewidth=1)
        axes.text(0.5, len(names) - 0.2, "chance", color=MEMORY_COLORS["off"], ha="center", va="bottom", fontsize=9)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set(xlim=(0, 1), xlabel="accuracy (bar: mean of a phenomenon; tick: a paradigm)")
        axes.set_title(f"BLiMP: {result.accuracy:.3f} over {len(result.paradigms)} paradigms", pad=18)
        axes.grid(axis="y", visible=False)
        figure.tight_layout()
        save_figure(figure, folder / "blimp.png")


def evaluate_blimp(
    model: EvaluatedModel, paradigms: Sequence[Paradigm], path: str, context: EvaluationContext
) -> BlimpResult:
    """Evaluate some paradigms, which were read from `path`."""
    scores: dict[str, ParadigmScore] = {}
    with ProgressBar("blimp", len(paradigms), shown=collectives.is_rank_zero()) as progress:
        for paradigm in paradigms:
            compute = partial(compute_accuracy, model, paradigm, context.batch_tokens)
            options = {"data": paradigm.sha256()}
            found = context.cache.get_or_compute(f"blimp/{paradigm.name}", options, Accuracy, compute)
            scores[paradigm.name] = ParadigmScore(found.accuracy, len(paradigm.pairs), paradigm.phenomenon)
            progress.advance({"accuracy": f"{fmean(score.accuracy for score in scores.values()):.3f}"})
    by_phenomenon: dict[str, list[float]] = {}
    for score in scores.values():
        by_phenomenon.setdefault(score.phenomenon, []).append(score.accuracy)
    hashes = "".join(paradigm.sha256() for paradigm in paradigms)
    return BlimpResult(
        accuracy=fmean(score.accuracy for score in scores.values()),
        phenomena={name: fmean(accuracies) for name, accuracies in sorted(by_phenomenon.items())},
        paradigms=scores,
        data=DataFacts(path, hashlib.sha256(hashes.encode()).hexdigest()),
    )


def read_paradigms(path: str, limit: int | None) -> list[Paradigm]:
    """Return the first `limit` pairs (None: all) of each paradigm, from a folder of JSONL files or the hub.

    Raises:
        UserError: no such folder or dataset, or a file is not in BLiMP's format.
    """
    if Path(path).is_dir():
        lines = {file.stem: read_file(file) for file in sorted(Path(path).iterdir()) if file.suffix.lower() == ".jsonl"}
        if not lines:
            raise UserError(f"--blimp {path} holds no .jsonl files: name the folder with BLiMP's 67, its data/")
    else:
        lines = read_from_hub(path)
    return [
        Paradigm(
            name,
            rows[0].get("linguistics_term", "all"),
            [(row["sentence_good"], row["sentence_bad"]) for row in rows[:limit]],
        )
        for name, rows in lines.items()
    ]


def read_file(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file, checked for the two sentences."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not rows or not all(row["sentence_good"] and row["sentence_bad"] for row in rows):
            raise ValueError("the file or a sentence is empty")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--blimp: {file} is not a BLiMP file ({error}): each line is JSON with sentence_good and sentence_bad"
        ) from error
    return rows


def read_from_hub(name: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each paradigm of a dataset on the hub."""
    import datasets  # takes seconds, and is rarely needed

    try:
        names = sorted(datasets.get_dataset_config_names(name))
        return {each: datasets.load_dataset(name, each, split="train").to_list() for each in names}
    except Exception as error:  # of several libraries
        raise UserError(
            f"--blimp {name}: no such folder, and no such dataset on the hub ({first_line(error)}): fetch BLiMP from "
            "github.com/alexwarstadt/blimp and name its folder data/"
        ) from error


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
