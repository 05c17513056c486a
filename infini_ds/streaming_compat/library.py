"""The only import of MosaicML Streaming: `from infini_ds.streaming_compat.library import MDSWriter`.

What is imported from here is plain streaming. `ShardDataset` (dataset.py) is the dataset with all repairs.
"""

import sys
import types
import warnings


def _torchvision_works() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # RuntimeError: it was built for another torch
        return False
    return True


def _import_without_torchvision() -> None:
    """Put an empty module in the place of `streaming.vision` if torchvision is missing or broken.

    `import streaming` imports `streaming.vision`, which needs torchvision and which nothing in this project uses. No
    upstream issue is known.
    """
    if "streaming" not in sys.modules and not _torchvision_works():
        sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _import_without_torchvision()
    from streaming import LocalDataset, MDSWriter, Stream, StreamingDataLoader, StreamingDataset
    from streaming.base import dataset as dataset_module
    from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
    from streaming.base.dataset import _Iterator as EpochIterator
    from streaming.base.dataset import _ShardState as ShardState
    from streaming.base.format import reader_from_json
    from streaming.base.format.base.reader import FileInfo, Reader
    from streaming.base.shared import SharedMemory
    from streaming.base.shared import array as array_module
    from streaming.base.shared.prefix import _pack_locals as pack_locals
    from streaming.base.storage import CloudDownloader
    from streaming.base.util import retry
    from streaming.base.world import World

__all__ = [
    "BARRIER_FILELOCK",
    "CACHE_FILELOCK",
    "LOCALS",
    "SHM_TO_CLEAN",
    "CloudDownloader",
    "EpochIterator",
    "FileInfo",
    "LocalDataset",
    "MDSWriter",
    "Reader",
    "ShardState",
    "SharedMemory",
    "Stream",
    "StreamingDataLoader",
    "StreamingDataset",
    "World",
    "array_module",
    "dataset_module",
    "pack_locals",
    "reader_from_json",
    "retry",
]
