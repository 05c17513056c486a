"""The only door to MosaicML Streaming: `from infini_ds.streaming_compat.library import MDSWriter, StreamingDataset`.

`import streaming` reaches torchvision through `streaming.vision` alone, which nothing here uses. Where torchvision is
missing, or broken (one built for another torch raises RuntimeError as it loads), an empty module takes that place; a
working one is left alone.

Two things are mended here. streaming keeps each segment of shared memory that it has ever opened until the process
ends, those too that it only looks at to find a free number: a process that opens data again and again, as one that goes
back to a checkpoint does, would run out of file descriptors. Here a segment goes with the last reference to it. And in
streaming each rank looks for a free number by itself, so that another run, which starts or ends meanwhile, may lead
them to different ones. Here the first rank of a node takes one, in one step, and tells the others.
"""

import itertools
import os
import sys
import tempfile
import types
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist


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
    from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
    from streaming.base.dataset import _ShardState as ShardState
    from streaming.base.format import reader_from_json
    from streaming.base.shared import SharedMemory, array, prefix
    from streaming.base.storage import CloudDownloader
    from streaming.base.util import retry
    from streaming.base.world import World


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


# Behind a dataset's number, the names of its segments in shared memory and of its file locks.
SEGMENTS = tuple(SHM_TO_CLEAN)
FILE_LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)
SHM = Path("/dev/shm")


def _take_number(folders: list[str], remotes: list, world, retry: int = 0) -> tuple[int, SharedMemory]:
    """A free number for a dataset, and the segment that holds its folders, in place of streaming's `get_shm_prefix`."""
    number = segment = None
    if world.is_local_leader:
        for number in itertools.count():
            taken = [SHM / f"{number:06}_{name}" for name in SEGMENTS]
            taken += [Path(tempfile.gettempdir(), f"{number:06}_{name}") for name in FILE_LOCKS]
            content = prefix._pack_locals(folders, number)
            with suppress(FileExistsError):  # another run was faster
                if not any(file.exists() for file in taken):
                    segment = _OwnedSharedMemory(f"{number:06}_{LOCALS}", True, len(content))
                    break
        segment.buf[: len(content)] = content
    if dist.is_available() and dist.is_initialized():
        numbers = [None] * dist.get_world_size()
        dist.all_gather_object(numbers, number)
        number = numbers[world.node * world.ranks_per_node]
    return number, segment or _OwnedSharedMemory(f"{number:06}_{LOCALS}", False)


array.SharedMemory = dataset.SharedMemory = _OwnedSharedMemory
dataset.get_shm_prefix = _take_number

__all__ = [
    "FILE_LOCKS",
    "SEGMENTS",
    "SHM",
    "CloudDownloader",
    "LocalDataset",
    "MDSWriter",
    "ShardState",
    "Stream",
    "StreamingDataLoader",
    "StreamingDataset",
    "World",
    "reader_from_json",
    "retry",
]
