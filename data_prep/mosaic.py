"""The only door to MosaicML Streaming: `from data_prep.mosaic import MDSWriter, StreamingDataset`.

`import streaming` reaches torchvision through `streaming.vision` alone, which nothing here uses. Where torchvision is
missing, or broken (one built for another torch raises RuntimeError as it loads), an empty module takes that place; a
working one is left alone.
"""

import sys
import types
import warnings


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
    from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
    from streaming.base.dataset import _ShardState as ShardState
    from streaming.base.storage import CloudDownloader
    from streaming.base.util import retry

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
