"""The texts of GLUE and SuperGLUE, from files or the hub, and their tokens.

Files are those of the BabyLM pipeline of 2023: JSON lines, TASK.train.json and TASK.validation.json (of mnli
validation_matched), each line an object with `label` and the columns of one of `FORMS`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import torch
from transformers import PreTrainedTokenizerBase

from infini_ds.evaluation.finetuning import Examples
from infini_ds.utils.errors import UserError

HUB = "hub"  # in place of a folder

# The texts of an example: the first of these whose columns it has (finetune_classification.py).
FORMS = (
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
class Texts:
    """The examples of a split: one text or a pair each, and the label as the file has it."""

    texts: list[tuple[str, ...]]
    labels: list


def load(data: str, hub: str, name: str, split: str) -> Texts:
    """One split of a task, from the folder `data`, or if that is "hub" from the dataset `hub`.

    Raises:
        UserError: it is not there, or it is broken.
    """
    if data == HUB:
        if not hub:
            raise UserError(f"--glue-tasks {name} is not on the hub: leave it out, or name its folder with --glue")
        return texts_of(f"{hub} {name} {split}", rows_of_hub(hub, name, split))
    if not Path(data).is_dir():
        raise UserError(f"--glue {data}: there is no such folder; give one of JSON lines, or {HUB}")
    file = Path(data, f"{name}.{split}.json")
    return texts_of(str(file), rows_of_file(file))


def rows_of_hub(hub: str, name: str, split: str) -> list[dict]:
    import datasets  # takes seconds, and is seldom needed

    try:
        return datasets.load_dataset(hub, name, split=split).to_list()
    except Exception as error:  # by what is wrong: errors of `datasets`, of the hub's client, of the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"--glue {HUB}: {hub} {name} {split} cannot be loaded ({reason}); a folder of JSON lines does as well"
        ) from error


def rows_of_file(file: Path) -> list[dict]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is not an object")
        return rows
    except OSError as error:
        raise UserError(f"--glue: {file} cannot be read ({error.strerror}); leave its task out, or add it") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise UserError(f"--glue: {file} is not JSON lines in UTF-8 ({error}); mend it") from error


def texts_of(where: str, rows: list[dict]) -> Texts:
    columns = set(rows[0]) if rows else set()
    form = next((form for form in FORMS if columns_of(form) | {"label"} <= columns), None)
    if form is None:
        raise UserError(
            f"--glue: {where} has the columns {', '.join(sorted(columns)) or 'of no row'}; it takes label and those of "
            "one of the tasks of GLUE, such as sentence, or sentence1 and sentence2"
        )
    try:
        return Texts([tuple(text.format(**row) for text in form) for row in rows], [row["label"] for row in rows])
    except KeyError as error:
        raise UserError(f"--glue: a row of {where} has no column {error}; all rows need the same columns") from error


def columns_of(form: tuple[str, ...]) -> set[str]:
    return {name for text in form for _, name, _, _ in Formatter().parse(text) if name}


def thinned(split: Texts, limit: int | None) -> Texts:
    """`limit` examples, taken evenly; None: all."""
    number = len(split.texts)
    kept = min(limit or number, number)
    chosen = [i * number // kept for i in range(kept)]
    return Texts([split.texts[i] for i in chosen], [split.labels[i] for i in chosen])


def sha256_of(*splits: Texts) -> str:
    content = json.dumps([[split.texts, split.labels] for split in splits])
    return hashlib.sha256(content.encode()).hexdigest()


def tokenized(split: Texts, classes: list, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
    """Each text behind the start token (the end token, where there is none), the second of a pair too: so does OPT's
    tokenizer, whose model is the pipeline's baseline of this kind. GPT-2's would put nothing between the two.

    `max_length`: of a row, the start tokens included.
    """
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = [number for number in known if number is not None][:1]
    ids = [
        tokenizer([texts[i] for texts in split.texts], add_special_tokens=False, verbose=False)["input_ids"]
        for i in range(len(split.texts[0]))
    ]
    room = max_length - len(start) * len(ids)
    rows = [[token for text in shortened(texts, room) for token in start + text] for texts in zip(*ids, strict=True)]
    return Examples(rows, torch.tensor([classes.index(label) for label in split.labels]))


def shortened(texts: tuple[list[int], ...], room: int) -> list[list[int]]:
    """To `room` tokens together; of a pair the longer one is cut first, as with `truncation="longest_first"`."""
    if len(texts) == 1:
        return [texts[0][:room]]
    a, b = texts
    return [a[: max(room - len(b), room - room // 2)], b[: max(room - len(a), room // 2)]]
