"""A folder that appears whole or not at all: built under another name beside its place, and renamed at the very end."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A lock on this file says that the process which builds lives; the kernel lets go of it however that process ends.
LOCK = ".data_prep.lock"


@contextmanager
def build_folder(out: Path, replace: bool) -> Iterator[Path]:
    """Gives the folder to fill; `out` takes its place when the block ends well, and it is removed otherwise.

    `replace`: `out` is there, is ours, and is to be removed. Folders that killed runs left are removed first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out)
    partial = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        with open(partial / LOCK, "w") as lock:
            with suppress(OSError):  # a file system without locks: abandoned folders are then left to the user
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield partial
            sync(partial)
            if replace:
                retire(out)
            partial.rename(out)
            (out / LOCK).unlink()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    remove_abandoned(out)


def retire(out: Path) -> None:
    """Moves `out` out of the way, as a folder that `remove_abandoned` knows."""
    (out / LOCK).touch()
    out.rename(out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:8]}"))


def remove_abandoned(out: Path) -> None:
    """Removes what runs for the same `out` left behind that were killed, and nothing without our lock file in it."""
    for lock in out.parent.glob(f"*.partial-*/{LOCK}"):
        if lock.parent.name.startswith(f"{out.name}.partial-") and is_free(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)


def is_free(lock: Path) -> bool:
    try:
        with open(lock, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, just gone, or on a file system without locks: leave it
        return False
    return True


def sync(folder: Path) -> None:
    """Waits until every file is on disk: some file systems tell only then that they are full."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
