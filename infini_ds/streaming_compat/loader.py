"""A loader of batches that are objects and not dicts of tensors."""

from collections.abc import Sized

from infini_ds.streaming_compat.library import StreamingDataLoader


class BatchLoader(StreamingDataLoader):
    """Counts the rows of a batch by its length. streaming takes the length of its first item, `len(batch[0])`."""

    def _get_batch_size(self, batch: Sized) -> int:
        return len(batch)
