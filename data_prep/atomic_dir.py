"""Builds a folder atomically: under another name beside its place, and renamed at the very end."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from infini_ds.utils.errors import UserError

# While a process builds a folder it locks this file in it. The kernel releases the lock however that process ends.
LOCK = ".data_prep.lock"


@contextmanager
def build_folder(out: Path, replace: bool) -> Iterator[Path]:
    """Give the block an empty folder to fill, which replaces `out` if the block succeeds, and is removed otherwise.

    Folders that killed runs for the same `out` left are removed first.

    Args:
        replace: `out` exists, was built by this function, and may be removed.
    Raises:
        UserError: no folder can be made at that place.
    """
    partial = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        partial.mkdir()
    except FileNotFoundError as error:  # a file system without folders of users, such as /proc
        raise UserError(f"--out {out}: no folder can be made there ({error.strerror}); name another") from error
    try:
        with open(partial / LOCK, "w") as lock:
            with suppress(OSError):  # a file system without locks: abandoned folders are then left to the user
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield partial
            _fsync_files(partial)
            if replace:
                _move_away(out)
            partial.rename(out)
            (out / LOCK).unlink()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    remove_abandoned(out)


def remove_abandoned(out: Path) -> None:
    """Remove what killed runs for the same `out` left, and nothing that does not hold the lock file."""
    for lock in out.parent.glob(f"*.partial-*/{LOCK}"):
        if lock.parent.name.startswith(f"{out.name}.partial-") and _is_unlocked(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)


def _move_away(out: Path) -> None:
    """Rename `out` so that `remove_abandoned` removes it."""
    (out / LOCK).touch()
    out.rename(out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:8]}"))


def _is_unlocked(lock: Path) -> bool:
    try:
        with open(lock, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, just removed, or on a file system without locks
        return False
    return True


def _fsync_files(folder: Path) -> None:
    """Wait until every file is on the disk: some file systems report only then that they are full."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
