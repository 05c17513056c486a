"""Errors that the user can fix, and helpers for their sentences."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix. The message is one sentence: the option, its value, and the remedy.

    `distributed.entry_point.run_main` prints the sentence without a stack and exits with code 2. Every other exception
    is a bug in the program and keeps its stack. `INFINI_DS_TRACEBACK=1` shows the stack of a UserError too.
    """


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like `name`, or None if no other one is like it.

    Args:
        cutoff: least similarity, from 0 to 1, as for `difflib.get_close_matches`.
    """
    near = difflib.get_close_matches(name, [other for other in known if other != name], n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: str, known: Iterable[str], prefix: str = "", cutoff: float = 0.6) -> str:
    """Return ": did you mean NEAREST?" for an unknown `name`, or "; known are ..." if no known name is near.

    Args:
        prefix: goes before the nearest name, such as "model.config.".
        cutoff: as for `nearest`.
    """
    known = list(known)
    near = nearest(name, known, cutoff)
    return f": did you mean {prefix}{near}?" if near else f"; known are {', '.join(sorted(known))}"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message without the final period, or its type if it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
