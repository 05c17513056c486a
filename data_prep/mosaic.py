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
    from streaming.base.util import clean_stale_shared_memory

__all__ = [
    "LocalDataset",
    "MDSWriter",
    "Stream",
    "StreamingDataLoader",
    "StreamingDataset",
    "clean_stale_shared_memory",
]
