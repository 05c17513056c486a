"""A loader of batches that are objects."""

from collections.abc import Sized

from infini_ds.streaming_compat.library import StreamingDataLoader


class BatchLoader(StreamingDataLoader):
    """A loader that counts the rows of a batch, for its position in the epoch, by the batch's length.

    streaming knows dicts, tensors and sequences of columns, and takes `len(batch[0])` for all other types:
    https://github.com/mosaicml/streaming/issues/441, which was resolved for one more type.
    """

    def _get_batch_size(self, batch: Sized) -> int:
        return len(batch)
