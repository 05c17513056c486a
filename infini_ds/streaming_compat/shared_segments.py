"""Segments of shared memory that are closed with the last reference to them.

streaming keeps every segment that it has opened until the process ends, also those that it only opens to look for a
free prefix. So a process that opens data again and again, as a run with rollbacks does, runs out of file descriptors.
https://github.com/mosaicml/streaming/issues/457
"""

import os
import weakref
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory as Segment

from infini_ds.streaming_compat.library import SharedMemory, array_module, dataset_module


class OwnedSharedMemory(SharedMemory):
    """A segment that is closed with the last reference to it, and then removed by the process that created it."""

    def __init__(self, name: str | None = None, create: bool | None = None, size: int = 0, auto_cleanup: bool = True):
        super().__init__(name, create, size, auto_cleanup=False)
        if auto_cleanup:
            weakref.finalize(self, _close, os.getpid(), self.created_shms, self.opened_shms)


def _close(creator: int, created: list[Segment], opened: list[Segment]) -> None:
    for segment in (*created, *opened):
        segment.close()
    if os.getpid() == creator:  # and not a data worker that was forked from it
        for segment in created:
            with suppress(FileNotFoundError):
                segment.unlink()


def install() -> None:
    """Make streaming's datasets of this process use such segments."""
    array_module.SharedMemory = OwnedSharedMemory  # type: ignore[misc]
    dataset_module.SharedMemory = OwnedSharedMemory  # type: ignore[misc]
