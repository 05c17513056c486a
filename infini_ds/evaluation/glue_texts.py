"""The texts of GLUE and SuperGLUE, from files or the hub, and their tokens.

The files are those of the BabyLM pipeline of 2023: JSON lines, TASK.train.json and TASK.validation.json (mnli:
validation_matched). Each line is an object with `label` and the columns of one of TEMPLATES.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from infini_ds.evaluation.finetuning import Examples
from infini_ds.utils.errors import UserError, first_line
from infini_ds.utils.hashing import sha256_of_json

HUB = "hub"  # value of --glue that names no folder

# The texts of an example, by the first of these whose columns it has (finetune_classification.py).
TEMPLATES = (
    ("{sentence1}", "{sentence2}"),
    ("{question1}", "{question2}"),
    ("{premise}", "{hypothesis}"),
    ("{question}", "{passage}"),
    ("{question}", "{sentence}"),
    ("Question: {question} Answer: {answer}", "{paragraph}"),
    ('Does "{span2_text}" refer to "{span1_text}" in this passage?', "{text}"),
    ("{sentence}",),
)


@dataclass(frozen=True)
class Split:
    """The examples of a split: one text or a pair of texts each, and the label as it is in the data."""

    texts: list[tuple[str, ...]]
    labels: list[int | str]


def load_split(data: str, hub: str, name: str, split: str) -> Split:
    """Return one split of a task, from the folder `data`, or from the dataset `hub` if `data` is "hub".

    Raises:
        UserError: the split is missing or damaged.
    """
    if data == HUB:
        if not hub:
            raise UserError(f"--glue-tasks {name} is not on the hub: leave it out, or name its folder with --glue")
        return split_of(f"{hub} {name} {split}", rows_from_hub(hub, name, split))
    if not Path(data).is_dir():
        raise UserError(f"--glue {data}: no such folder; give one of JSON lines, or {HUB}")
    file = Path(data, f"{name}.{split}.json")
    return split_of(str(file), rows_from_file(file))


def rows_from_hub(hub: str, name: str, split: str) -> list[dict[str, Any]]:
    import datasets  # takes seconds, and is rarely needed

    try:
        return datasets.load_dataset(hub, name, split=split).to_list()
    except Exception as error:  # of `datasets`, of the hub's client, or of the network
        raise UserError(
            f"--glue {HUB}: {hub} {name} {split} cannot be loaded ({first_line(error)}): give a folder of JSON lines"
        ) from error


def rows_from_file(file: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is not an object")
        return rows
    except OSError as error:
        raise UserError(f"--glue: {file} cannot be read ({error.strerror}): add it, or leave its task out") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise UserError(f"--glue: {file} is not JSON lines in UTF-8 ({error}): fix it") from error


def split_of(where: str, rows: list[dict[str, Any]]) -> Split:
    """Return the texts and labels of rows that were read from `where`.

    Raises:
        UserError: the columns are not those of a task of GLUE.
    """
    columns = set(rows[0]) if rows else set()
    template = next((texts for texts in TEMPLATES if columns_of(texts) | {"label"} <= columns), None)
    if template is None:
        found = f"the columns {', '.join(sorted(columns))}" if columns else "no rows"
        raise UserError(
            f"--glue: {where} has {found}, but needs label and the columns of one of the tasks of GLUE, such as "
            "sentence, or sentence1 and sentence2"
        )
    try:
        texts = [tuple(text.format(**row) for text in template) for row in rows]
        return Split(texts, [row["label"] for row in rows])
    except KeyError as error:
        raise UserError(f"--glue: a row of {where} has no column {error}: all rows need the same columns") from error


def columns_of(template: tuple[str, ...]) -> set[str]:
    return {name for text in template for _, name, _, _ in Formatter().parse(text) if name}


def evenly_spaced(split: Split, limit: int | None) -> Split:
    """Return `limit` examples (None: all), evenly spaced over the split."""
    number = len(split.texts)
    kept = min(limit or number, number)
    chosen = [i * number // kept for i in range(kept)]
    return Split([split.texts[i] for i in chosen], [split.labels[i] for i in chosen])


def sha256_of_splits(*splits: Split) -> str:
    return sha256_of_json([[split.texts, split.labels] for split in splits])


def tokenize(
    split: Split, classes: Sequence[int | str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Examples:
    """Tokenize each text after a start token (or the end token, if there is no start token).

    The second text of a pair has a start token too, as in OPT's tokenizer, whose model is the pipeline's baseline of
    this kind. GPT-2's tokenizer would put nothing between the two.

    Args:
        max_length: of a row, start tokens included.
    """
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = [number for number in special if number is not None][:1]
    ids = [
        tokenizer([texts[i] for texts in split.texts], add_special_tokens=False, verbose=False)["input_ids"]
        for i in range(len(split.texts[0]))
    ]
    max_tokens = max_length - len(start) * len(ids)
    truncated = [truncate(texts, max_tokens) for texts in zip(*ids, strict=True)]
    rows = [[token for text in texts for token in start + text] for texts in truncated]
    return Examples(rows, torch.tensor([classes.index(label) for label in split.labels]))


def truncate(texts: tuple[list[int], ...], max_tokens: int) -> list[list[int]]:
    """Truncate texts to `max_tokens` in total; of a pair the longer one first, as `truncation="longest_first"` does."""
    if len(texts) == 1:
        return [texts[0][:max_tokens]]
    a, b = texts
    return [
        a[: max(max_tokens - len(b), max_tokens - max_tokens // 2)],
        b[: max(max_tokens - len(a), max_tokens // 2)],
    ]
