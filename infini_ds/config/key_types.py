"""Types of the values of a recipe's keys that several sections share: paths, bytes, numbers of steps, recall tasks."""

import math
import os
import re
from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, Field

from data_prep.options import byte_count
from infini_ds.config.keys import Words
from infini_ds.utils.errors import UserError


def _check_bytes(text: str) -> str:
    try:
        byte_count(text)
    except UserError as error:
        raise ValueError(str(error)) from error
    return text


def _check_share(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?%", text) or not 0 < Fraction(text[:-1]) <= 100:
        raise ValueError("it is not a share of the steps such as 10%")
    return text


def _check_folder_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name:
        raise ValueError("it is not the name of one folder")
    return name


# A path or address as text; "~" at its start is the user's home.
PathText = Annotated[str, Words("a path"), Field(min_length=1), AfterValidator(os.path.expanduser)]
AddressText = Annotated[str, Words("a path or address"), Field(min_length=1), AfterValidator(os.path.expanduser)]
ByteCount = Annotated[str, Words("a number of bytes such as 200GB or 64MiB"), AfterValidator(_check_bytes)]
FolderName = Annotated[
    str, Words("the name of one folder, whose path goes in output="), AfterValidator(_check_folder_name)
]

# A number of steps: absolute, or as a share of the run's, which follows it when the run is made longer or shorter.
Share = Annotated[str, Words("a share of the steps such as 10%"), AfterValidator(_check_share)]
StepCount = Annotated[int, Field(ge=0)] | Share
Interval = Annotated[int, Field(ge=1)] | Share


def split_tasks(text: str | None) -> tuple[str, ...]:
    """Return the recall tasks of "TASK+TASK", each once; none for null."""
    return () if text is None else tuple(dict.fromkeys(text.split("+")))


def part(share: str, steps: int) -> Fraction:
    return Fraction(share[:-1]) / 100 * steps


def interval(every: int | str, steps: int) -> int:
    """Return a number of steps between events: of a share rounded up, so that none falls just before the last step."""
    return every if isinstance(every, int) else math.ceil(part(every, steps))
