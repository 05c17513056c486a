"""The prefix in the names of a dataset's shared memory and file locks, such as 000003 in /dev/shm/000003_locals.

In streaming every rank looks for a free prefix by itself and registers it later. So two runs that start at the same
time take the same prefix, and one of them fails (https://github.com/mosaicml/streaming/issues/884); and a run that
starts or ends meanwhile can lead the ranks of another run to different prefixes. streaming also refuses to read remote
data through a local folder that another process uses (https://github.com/mosaicml/streaming/issues/306), which
`ShardStream` makes safe.
"""

import itertools
import tempfile
from pathlib import Path

import torch.distributed as dist

from infini_ds.streaming_compat.library import (
    BARRIER_FILELOCK,
    CACHE_FILELOCK,
    LOCALS,
    SHM_TO_CLEAN,
    SharedMemory,
    World,
    dataset_module,
    pack_locals,
)
from infini_ds.streaming_compat.shared_segments import OwnedSharedMemory

# The names of a dataset's segments and of its file locks, after the prefix.
SEGMENTS = tuple(SHM_TO_CLEAN)
FILE_LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)
SHM = Path("/dev/shm")


def take_prefix(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 0
) -> tuple[int, SharedMemory]:
    """Return a free prefix for a dataset, the same on all ranks of a node, and the segment that names its folders.

    The first rank of a node takes the prefix in one step, by creating that segment, and sends it to the other ranks.
    The arguments are those of streaming's `get_shm_prefix`.
    """
    prefix = segment = None
    if world.is_local_leader:
        prefix, segment = _take_free_prefix(streams_local)
    if dist.is_available() and dist.is_initialized():
        prefixes: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(prefixes, prefix)
        prefix = prefixes[world.node * world.ranks_per_node]
    assert prefix is not None, "a rank that is not the first of its node needs a process group"
    return prefix, segment or OwnedSharedMemory(f"{prefix:06}_{LOCALS}", False)


def _take_free_prefix(folders: list[str]) -> tuple[int, SharedMemory]:
    for prefix in itertools.count():
        files = [SHM / f"{prefix:06}_{name}" for name in SEGMENTS if name != LOCALS]
        files += [Path(tempfile.gettempdir(), f"{prefix:06}_{name}") for name in FILE_LOCKS]
        content = pack_locals(folders, prefix)
        try:
            segment = OwnedSharedMemory(f"{prefix:06}_{LOCALS}", True, len(content))
        except FileExistsError:
            continue
        # Looked at only now that no other run can take the prefix: a run that ends removes its segments one by one.
        if any(file.exists() for file in files):
            del segment
            continue
        segment.buf[: len(content)] = content
        return prefix, segment
    raise AssertionError("unreachable")


def install() -> None:
    """Make streaming's datasets of this process take their prefix this way."""
    dataset_module.get_shm_prefix = take_prefix
