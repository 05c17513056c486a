"""A lock on a run's folder: two jobs in one folder would remove each other's checkpoints."""

import errno
import fcntl
import time
from pathlib import Path
from typing import TextIO

from infini_ds.utils.errors import UserError

LOCK = ".lock"
TIMEOUT = 10.0  # seconds for which the ranks of an earlier job may still need to exit


class LockedError(UserError):
    """Another job holds the lock."""


def acquire_run_lock(folder: Path) -> TextIO:
    """Create the run's folder if it does not exist, and lock it until the returned file is closed or this process ends.

    Raises:
        UserError: the folder cannot be written.
        LockedError: another job holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")  # noqa: SIM115, closed by the caller
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): choose another output folder, or repair that one"
        ) from error
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            # Not flock: data workers are forks, and would inherit that lock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # a file system without locks
            if time.monotonic() > deadline:
                file.close()
                raise LockedError(
                    f"another job is training in {folder}: wait until it ends, or give this run another name"
                ) from error
        time.sleep(0.2)
