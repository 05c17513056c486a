"""BLiMP (Warstadt et al. 2020, arXiv:1912.00582): which of two sentences, one of them wrong, is likelier?

Scored as lm-evaluation-harness does: the log-probability of the whole sentence behind the start token, with a space in
front of it, not divided by its length; where both are equal the model is right. The score of all is the mean over
paradigms.
"""

import hashlib
import json
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from infini_ds.data.batches import pad_documents
from infini_ds.distributed import collectives
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.result_cache import ResultCache
from infini_ds.evaluation.scoring import batches_by_length, token_losses
from infini_ds.utils.errors import UserError
from infini_ds.utils.progress import ProgressBar

HUB = "nyu-mll/blimp"


class Paradigm(NamedTuple):
    """phenomenon: the data's `linguistics_term`. pairs: (good, bad) sentences."""

    name: str
    phenomenon: str
    pairs: list[tuple[str, str]]

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.pairs).encode()).hexdigest()


def measure(subject: EvaluatedModel, paradigms: list[Paradigm], where: str, session: ResultCache) -> dict:
    """
    Args:
        paradigms: from `read_paradigms`; where: what they were read from.
    """
    results = {}
    with ProgressBar("blimp", len(paradigms), shown=collectives.is_rank_zero()) as progress:
        for paradigm in paradigms:
            found = session.part(
                f"blimp/{paradigm.name}",
                {"data": paradigm.sha256()},
                lambda paradigm=paradigm: {"accuracy": accuracy(subject, paradigm, session.batch_tokens)},
            )
            results[paradigm.name] = found | {"pairs": len(paradigm.pairs), "phenomenon": paradigm.phenomenon}
            progress.advance({"accuracy": f"{fmean(each['accuracy'] for each in results.values()):.3f}"})
    phenomena = {}
    for each in results.values():
        phenomena.setdefault(each["phenomenon"], []).append(each["accuracy"])
    whole = hashlib.sha256("".join(paradigm.sha256() for paradigm in paradigms).encode()).hexdigest()
    return {
        "accuracy": fmean(each["accuracy"] for each in results.values()),
        "phenomena": {name: fmean(of_paradigms) for name, of_paradigms in sorted(phenomena.items())},
        "paradigms": results,
        "data": {"path": where, "sha256": whole},
    }


def read_paradigms(where: str, limit: int | None) -> list[Paradigm]:
    """The first `limit` pairs (None: all) of each paradigm, from a folder of JSONL files or a data set on the hub.

    Raises:
        UserError: there is neither, or a file is no BLiMP.
    """
    if Path(where).is_dir():
        lines = {file.stem: _read_lines(file) for file in sorted(Path(where).glob("*.jsonl"))}
        if not lines:
            raise UserError(f"--blimp {where} holds no .jsonl files: name the folder with BLiMP's 67, its data/")
    else:
        lines = _from_hub(where)
    return [
        Paradigm(
            name,
            rows[0].get("linguistics_term", "all"),
            [(row["sentence_good"], row["sentence_bad"]) for row in rows[:limit]],
        )
        for name, rows in lines.items()
    ]


def _read_lines(file: Path) -> list[dict]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not rows or not all(row["sentence_good"] and row["sentence_bad"] for row in rows):
            raise ValueError("a sentence is empty, or all are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--blimp: {file} is no BLiMP file ({error}): each line is JSON with sentence_good and sentence_bad"
        ) from error
    return rows


def _from_hub(name: str) -> dict[str, list[dict]]:
    import datasets  # takes seconds, and is seldom needed

    try:
        names = sorted(datasets.get_dataset_config_names(name))
        return {each: datasets.load_dataset(name, each, split="train").to_list() for each in names}
    except Exception as error:  # of several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"--blimp {name}: there is no such folder, and the hub gave none of that name ({reason}): fetch BLiMP from "
            "github.com/alexwarstadt/blimp and name its folder data/"
        ) from error


def accuracy(subject: EvaluatedModel, paradigm: Paradigm, tokens: int) -> float:
    """The share of pairs whose good sentence is at least as likely as its bad one."""
    rows = [sentence_ids(subject.tokenizer, sentence) for pair in paradigm.pairs for sentence in pair]
    batches = batches_by_length(list(map(len, rows)), tokens)
    losses = [
        token_losses(subject.model, pad_documents([rows[i] for i in batch])).double().sum(1).tolist()
        for batch in collectives.split_across_ranks(batches)
    ]
    likely = [0.0] * len(rows)
    for batch, of_batch in zip(batches, collectives.gather_items(losses), strict=True):
        for number, loss in zip(batch, of_batch, strict=True):
            likely[number] = -loss
    return fmean(good >= bad for good, bad in zip(likely[::2], likely[1::2], strict=True))


def sentence_ids(tokenizer: PreTrainedTokenizerBase, sentence: str) -> list[int]:
    """Tokens of a sentence behind the start token (the end token, where there is none), as the harness makes them."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = tokenizer.encode(f" {sentence}", add_special_tokens=False)
    return ids if ids[0] == start else [start, *ids]
