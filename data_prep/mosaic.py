"""The only door to MosaicML Streaming: `from data_prep.mosaic import MDSWriter, StreamingDataset`.

`import streaming` reaches torchvision through `streaming.vision` alone, which nothing here uses. Where torchvision is
missing, or broken (one built for another torch raises RuntimeError as it loads), an empty module takes that place; a
working one is left alone.

streaming keeps each segment of shared memory that it has ever opened until the process ends, those too that it only
looks at to find a free number: a process that opens data again and again, as one that goes back to a checkpoint does,
would run out of file descriptors. Here a segment goes with the last reference to it.
"""

import os
import sys
import types
import warnings
import weakref
from contextlib import suppress


def _torchvision_works() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    if "streaming" not in sys.modules and not _torchvision_works():
        sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
    from streaming import LocalDataset, MDSWriter, Stream, StreamingDataLoader, StreamingDataset
    from streaming.base import dataset
    from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
    from streaming.base.dataset import _ShardState as ShardState
    from streaming.base.shared import SharedMemory, array, prefix
    from streaming.base.storage import CloudDownloader
    from streaming.base.util import retry


class _OwnedSharedMemory(SharedMemory):
    """A segment that is closed with its last reference, and then removed by the process that made it."""

    def __init__(self, name: str | None = None, create: bool | None = None, size: int = 0, auto_cleanup: bool = True):
        super().__init__(name, create, size, auto_cleanup=False)
        if auto_cleanup:
            weakref.finalize(self, _close, os.getpid(), self.created_shms, self.opened_shms)


def _close(maker: int, made: list, opened: list) -> None:
    for segment in (*made, *opened):
        segment.close()
    if os.getpid() == maker:  # and no data worker that was forked from it
        for segment in made:
            with suppress(FileNotFoundError):
                segment.unlink()


for module in (array, dataset, prefix):
    module.SharedMemory = _OwnedSharedMemory

# Behind a dataset's number, the names of its segments in shared memory and of its file locks.
SEGMENTS = tuple(SHM_TO_CLEAN)
FILE_LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)

__all__ = [
    "FILE_LOCKS",
    "SEGMENTS",
    "CloudDownloader",
    "LocalDataset",
    "MDSWriter",
    "ShardState",
    "Stream",
    "StreamingDataLoader",
    "StreamingDataset",
    "retry",
]
