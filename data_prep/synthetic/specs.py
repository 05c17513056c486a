"""Tasks as a user writes them: "pairs,distance=512+passkey,digits=6"."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from data_prep.synthetic.examples import Example, IntRange
from data_prep.synthetic.tasks import TASKS, RecallTask
from infini_ds.utils.errors import UserError, did_you_mean


def parse_task(text: str) -> RecallTask:
    """Return the task of "NAME,option=value,...".

    Raises:
        UserError: the name or an option is unknown, or a value is not possible.
    """
    name, *given = text.split(",")
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{did_you_mean(name, TASKS)}")
    task = TASKS[name](**parse_options(text, given, TASKS[name]))
    task.check()
    return task


def parse_options(text: str, given: Sequence[str], kind: type[Any]) -> dict[str, Any]:
    """Return the values of "option=value" texts by name.

    Args:
        text: what they are options of, for errors.
        kind: a dataclass with a `name`, whose fields they are; the type of a field is that of its default.
    Raises:
        UserError: an option is unknown, or a value has another form.
    """
    types = {field.name: type(field.default) for field in fields(kind)}
    options: dict[str, Any] = {}
    for option in given:
        key, _, value = option.partition("=")
        if key not in types:
            raise UserError(f"{text}: {kind.name} has no option {key!r}{did_you_mean(key, types)}")
        options[key] = _parse_value(key, value, types[key])
    return options


def parse_tasks(text: str) -> list[RecallTask]:
    """Return the tasks of "TASK+TASK+...", each as `parse_task` does."""
    return [parse_task(part) for part in text.split("+")]


def _parse_value(key: str, value: str, kind: type) -> str | int | IntRange:
    if kind is str:
        return value
    form = r"(\d+)(?:-(\d+))?" if kind is IntRange else r"(\d+)"
    match = re.fullmatch(form, value)
    if match is None:
        wanted = "a whole number, or a range such as 32-512" if kind is IntRange else "a whole number"
        raise UserError(f"{key}={value}: give {wanted}")
    if kind is int:
        return int(value)
    low, high = int(match[1]), int(match[2] or match[1])
    if high < low:
        raise UserError(f"{key}={value}: the smaller number comes first")
    return IntRange(low, high)


def training_examples(tasks: Sequence[RecallTask]) -> Iterator[tuple[RecallTask, Example]]:
    """Yield the training text of some tasks, which take turns, for a tokenizer with a token for each word."""
    for index in range(max(task.documents for task in tasks)):
        for task in tasks:
            if index < task.documents:
                yield task, task.example(task.seed, index, str.split)
