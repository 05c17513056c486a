"""One job at a time in a run's folder: two would remove each other's checkpoints."""

import errno
import fcntl
import time
from typing import TextIO

from infini_ds.training.recipe import Recipe

PATIENCE = 10.0  # seconds that the ranks of a job before may need to be gone


def claim(recipe: Recipe) -> TextIO:
    """Make the run's folder if it is not there, and keep other jobs out of it until what is returned is closed, or this
    process ends.

    Raises:
        ValueError: the folder cannot be written, or another job is in it.
    """
    try:
        recipe.folder.mkdir(parents=True, exist_ok=True)
        file = open(recipe.folder / ".lock", "a")  # noqa: SIM115, closed by the caller
    except OSError as error:
        raise ValueError(
            f"output={recipe.output}: {recipe.folder} cannot be written ({error.strerror}): give another output=, or "
            "mend that folder"
        ) from error
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # not flock, which data workers, as forks, would hold on to
            return file
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # a file system without locks
            if time.monotonic() > deadline:
                file.close()
                raise ValueError(
                    f"name={recipe.name}: another job is training in {recipe.folder}: wait for its end, or choose "
                    "another name="
                ) from error
        time.sleep(0.2)
