"""Cache of finished parts of evaluation tasks, so that a call that was killed resumes and nothing is computed twice."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import infini_ds
from infini_ds.distributed import collectives
from infini_ds.evaluation.serialization import from_json
from infini_ds.utils.atomic import write_json_atomic
from infini_ds.utils.errors import UserError, first_line
from infini_ds.utils.hashing import sha256_of_json

CACHE_FILE = "parts.json"  # finished parts, by their cache key
Options = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class ResultCache:
    """The finished parts of one model's evaluation, in `folder`/parts.json.

    The key of a part is a hash of its name, its options, the model and the version of infini_ds. Rank 0 reads and
    writes the file, the other ranks get its content by broadcast.

    Args:
        model: hash of the model and its tokenizer.
    """

    folder: Path
    model: str

    def get_or_compute(self, name: str, options: Options, result_type: type[T], compute: Callable[[], T]) -> T:
        """Return the cached result of a part, or that of `compute()`, which then runs on every rank.

        Args:
            options: cache-key options: all that the result depends on besides the model and the version.
            result_type: a dataclass.
        """
        finished = self._finished({name: options}, result_type)
        if name not in finished:
            finished[name] = compute()
            self._store(name, options, finished[name])
        return finished[name]

    def get_or_compute_all(
        self, options: Mapping[str, Options], result_type: type[T], compute: Callable[[str], T]
    ) -> dict[str, T]:
        """Return the results of several parts by name, each computed by one rank, different parts at the same time.

        Args:
            options: cache-key options of each part, in the order in which to compute them.
            compute: gets the name of a part.
        """
        finished = self._finished(options, result_type)
        missing = [name for name in options if name not in finished]
        ranks = collectives.world_size()
        for first in range(0, len(missing), ranks):
            names = missing[first : first + ranks]  # one for each rank
            results = collectives.gather_items([compute(name) for name in collectives.split_across_ranks(names)])
            for name, result in zip(names, results, strict=True):
                self._store(name, options[name], result)
                finished[name] = result
        return finished

    def _finished(self, options: Mapping[str, Options], result_type: type[T]) -> dict[str, T]:
        """Return the parts that earlier calls have finished, the same on every rank."""
        stored = collectives.broadcast_from_rank_zero(self._read)
        keys = {name: self._key(name, options[name]) for name in options}
        return {name: from_json(result_type, stored[key]["result"]) for name, key in keys.items() if key in stored}

    def _store(self, name: str, options: Options, result: Any) -> None:
        if collectives.is_rank_zero():
            parts = self._read() | {self._key(name, options): {"part": name, "result": asdict(result)}}
            write_results(self.folder / CACHE_FILE, parts)

    def _key(self, name: str, options: Options) -> str:
        return sha256_of_json(
            {"part": name, "model": self.model, "version": infini_ds.__version__, "options": dict(options)}
        )

    def _read(self) -> dict[str, Any]:
        return read_results(self.folder / CACHE_FILE, dict[str, Any]) or {}


def read_results(file: Path, kind: type[T]) -> T | None:
    """Return what a file of the results folder holds, or None if there is no such file.

    Raises:
        UserError: it is damaged.
    """
    if not file.is_file():
        return None
    try:
        return from_json(kind, json.loads(file.read_text()))
    except ValueError as error:  # of `json`, or of pydantic
        raise UserError(f"{file} is damaged ({first_line(error)}): remove it, and evaluate again") from error


def write_results(file: Path, content: dict[str, Any]) -> None:
    """Write a file of the results folder, which is created if needed.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): name another folder, with --out") from error
