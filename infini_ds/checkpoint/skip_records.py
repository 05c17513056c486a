"""What a run writes down of skipped steps and of rollbacks, in files that outlive it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from infini_ds.utils.atomic import write_text_atomic

SKIPPED_STEPS = "skipped_steps.jsonl"
SKIPPED_ROWS = "skipped_rows.jsonl"
# The files of runs that were begun before version 0.2; what they hold is read, and new lines go into those above.
OLD_SKIPPED_STEPS = "skipped.jsonl"
OLD_SKIPPED_ROWS = "passed_over.jsonl"


@dataclass(frozen=True)
class SkippedStep:
    """A step that was skipped: why ("loss", "gradient" or "spike"), on which ranks, and its rows by data rank."""

    step: int
    reason: str
    ranks: list[int]
    rows: list[list[int]]


@dataclass(frozen=True)
class Rollback:
    """A rollback to a checkpoint, and the numbers of the rows that the run skips since then."""

    from_step: int
    to_step: int
    reason: str
    rows: list[int]


def read_skipped_steps(run: Path) -> list[SkippedStep]:
    return [SkippedStep(**line) for line in _read(run / OLD_SKIPPED_STEPS) + _read(run / SKIPPED_STEPS)]


def read_rollbacks(run: Path) -> list[Rollback]:
    old = [Rollback(line["from"], line["back_to"], line["why"], line["rows"]) for line in _read(run / OLD_SKIPPED_ROWS)]
    return old + [Rollback(**line) for line in _read(run / SKIPPED_ROWS)]


def append_skipped_step(run: Path, step: SkippedStep) -> None:
    _append(run / SKIPPED_STEPS, asdict(step))


def append_rollback(run: Path, rollback: Rollback) -> None:
    _append(run / SKIPPED_ROWS, asdict(rollback))


def _read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _append(file: Path, line: dict) -> None:
    """Add a line, atomically and flushed to the disk: a run that is killed at any instant has all of it or nothing."""
    before = file.read_text() if file.exists() else ""
    write_text_atomic(file, before + json.dumps(line) + "\n")
