"""What the tasks of one call share: which parts earlier calls have finished, and how much runs at a time."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import infini_ds
from infini_ds.distributed import collectives
from infini_ds.utils.errors import UserError

EVALUATION = "evaluation.json"
PARTS = "parts.json"  # finished parts, by a hash of all that decides them


@dataclass(frozen=True)
class ResultCache:
    """folder: of the results. model: a hash of it and of its tokenizer. batch_tokens: computed at a time, which no
    result depends on."""

    folder: Path
    model: str
    batch_tokens: int

    def part(self, name: str, options: dict[str, Any], compute: Callable[[], dict]) -> dict:
        """The result of `compute()`, which runs on every rank unless an earlier call has finished this part.

        `options`: all that the result depends on besides the model and this package's version.
        """
        done = self._done({name: options})
        if name not in done:
            done[name] = compute()
            self._keep(name, options, done[name])
        return done[name]

    def parts(self, options: dict[str, dict[str, Any]], compute: Callable[[str], dict]) -> dict[str, dict]:
        """The results of parts that are not shared out, by name, in any order: one rank computes a part, and others
        another one at the same time. `options`: of each part.
        """
        done = self._done(options)
        waiting = [name for name in options if name not in done]
        for at in range(0, len(waiting), collectives.world_size()):
            some = waiting[at : at + collectives.world_size()]
            results = collectives.gather_items([compute(name) for name in collectives.split_across_ranks(some)])
            for name, result in zip(some, results, strict=True):
                self._keep(name, options[name], result)
                done[name] = result
        return done

    def _done(self, options: dict[str, dict[str, Any]]) -> dict[str, dict]:
        """What earlier calls have finished of these parts, on every rank."""
        kept = self._read() if collectives.is_rank_zero() else {}
        keys = {name: self._key(name, its) for name, its in options.items()}
        return collectives.broadcast_object({name: kept[key]["result"] for name, key in keys.items() if key in kept})

    def _keep(self, name: str, options: dict[str, Any], result: dict) -> None:
        if collectives.is_rank_zero():
            write_json(self.folder / PARTS, self._read() | {self._key(name, options): {"part": name, "result": result}})

    def _key(self, name: str, options: dict[str, Any]) -> str:
        decides = {"part": name, "model": self.model, "version": infini_ds.__version__, "options": options}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def _read(self) -> dict:
        file = self.folder / PARTS
        return json.loads(file.read_text()) if file.is_file() else {}


def earlier_tasks(folder: Path, model: str) -> dict:
    """What earlier calls have found of this very model, by task."""
    file = folder / EVALUATION
    earlier = json.loads(file.read_text()) if file.is_file() else None
    return earlier["tasks"] if earlier and earlier["model"]["sha256"] == model else {}


def write_json(file: Path, content: dict) -> None:
    """Whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): name another folder, with --out") from error
