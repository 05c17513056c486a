"""The recipe's training data: found, compared with what a run began with, its cache limit checked."""

from collections.abc import Sequence
from typing import Any, Protocol

from infini_ds.config.loader import show
from infini_ds.data import cache_limit
from infini_ds.data.sources import DataSource, StreamSpec, open_sources, open_stages
from infini_ds.utils.errors import UserError


class StreamChoice(Protocol):
    """A stream as a recipe names it; `path` is a folder or an address."""

    @property
    def path(self) -> str: ...

    @property
    def proportion(self) -> float | None: ...

    @property
    def repeat(self) -> float | None: ...


def find_sources(path: str, streams: Sequence[StreamChoice], cache: str) -> list[DataSource]:
    """Open the data that a recipe names: `data.streams`, or else `data.path` alone.

    Raises:
        UserError: as `open_sources`.
    """
    if streams:
        specs = [
            StreamSpec(f"data.streams[{i}].path", stream.path, stream.proportion, stream.repeat)
            for i, stream in enumerate(streams)
        ]
    else:
        specs = [StreamSpec("data.path", path)]
    return open_sources(specs, cache, "data.cache")


def find_stages(paths: Sequence[str], cache: str) -> list[DataSource]:
    """Open the data of the stages of a curriculum.

    Raises:
        UserError: as `open_stages`.
    """
    specs = [StreamSpec(f"data.curriculum[{number}].path", path) for number, path in enumerate(paths)]
    return open_stages(specs, cache, "data.cache")


def check_cache_limit(sources: Sequence[DataSource], limit: int, rows_ahead: int) -> None:
    """Raise a UserError if `data.cache_limit` is too small or deletes the only copy of a shard."""
    cache_limit.check_cache_limit(sources, limit, rows_ahead, "data.cache_limit", "data.cache")


def check_fingerprint(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise a UserError if a run that began with the data `theirs` cannot resume with `ours`."""
    if "stages" in theirs or "stages" in ours:
        _check_stages(theirs.get("stages", []), ours.get("stages", []))
        return
    for key in ("batch.rows", "data.seed"):
        if theirs[key] != ours[key]:
            raise UserError(
                f"{key}={ours[key]}, but this run's rows are drawn with {key}={theirs[key]}: give that, or choose "
                "another name="
            )
    if theirs["streams"] == ours["streams"]:
        return
    if len(theirs["streams"]) != len(ours["streams"]):
        raise UserError(
            f"the recipe names {len(ours['streams'])} streams of data, but this run began with "
            f"{len(theirs['streams'])}: name those, or choose another name="
        )
    for number, (before, now) in enumerate(zip(theirs["streams"], ours["streams"], strict=True)):
        for what in ("proportion", "repeat"):
            if before[what] != now[what]:
                raise UserError(
                    f"data.streams[{number}].{what}={show(now[what])}, but this run began with {show(before[what])}: "
                    "give that, or choose another name="
                )
        if before["shards"] != now["shards"]:
            raise UserError(
                f"the data of {'stream ' + str(number) if number else 'this run'} was prepared again, with other "
                "content, since it began: choose another name=, or give the path of the earlier data"
            )


def _check_stages(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    if len(theirs) != len(ours):
        began, names = (f"{len(stages)} stages" if stages else "no curriculum" for stages in (theirs, ours))
        raise UserError(
            f"data.curriculum: the recipe names {names}, but this run began with {began}: name those, or choose "
            "another name="
        )
    for number, (before, now) in enumerate(zip(theirs, ours, strict=True)):
        if before["streams"] != now["streams"]:
            raise UserError(
                f"data.curriculum[{number}].path: the data of this stage is not that which this run began with: give "
                "the path of the earlier data, or choose another name="
            )
        check_fingerprint(before, now)
