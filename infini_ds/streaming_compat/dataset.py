"""The dataset with all repairs: rows of shard streams, from which errors arrive where the rows are asked for."""

import logging
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from infini_ds.streaming_compat import shared_segments, shm_prefix
from infini_ds.streaming_compat.library import EpochIterator, ShardState, StreamingDataset
from infini_ds.streaming_compat.stale_memory import lock_segment

# streaming warns at each epoch that positions have to account for ranks that read the same rows. They do: they are
# counted in rows of the global batch (tests/data/test_streams.py).
logging.getLogger("streaming.base.dataset").addFilter(lambda record: "`replication` arg" not in record.getMessage())
shared_segments.install()
shm_prefix.install()


class ShardDataset(StreamingDataset):
    """A streaming dataset whose rows have their number, `row`, counted through all streams."""

    failure: BaseException | None = None  # of a background thread

    def __init__(self, **options: Any):
        super().__init__(**options)
        weakref.finalize(self, os.close, lock_segment(self._locals_shm.shm.name))

    @property
    def data_rank_and_size(self) -> tuple[int, int]:
        """Return which part of each global batch this rank reads, and the number of parts."""
        return self._parallel_rank_world.rank, self._parallel_rank_world.num_ranks

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        return super().get_item(sample_id, retry) | {"row": sample_id}

    def on_exception(self, future: Future[None]) -> None:
        """Keep the error of a background thread, and stop the other threads.

        streaming raises it in a callback, where Python only logs it, so the epoch seems to end early, or an error
        without the reason is raised. No upstream issue is known for datasets; in the writer the same pattern was
        https://github.com/mosaicml/streaming/issues/753
        """
        if (error := future.exception()) is not None:
            self.failure = error
            self._event.set()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Make a shard ready, and give it back if that fails.

        streaming leaves it in the state PREPARING, in which all other processes and threads wait for it forever. No
        upstream issue is known.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            self._shard_states[shard_id] = ShardState.REMOTE
            if self._cache_filelock.is_locked:
                self._cache_filelock.release()
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of an epoch, and end its threads with it.

        streaming's threads of an epoch that is left early run forever, and keep the dataset alive. No upstream issue is
        known.

        Raises:
            ShardError: a shard cannot be read.
        """
        self._end_threads_at_exit()
        epoch: EpochIterator | None = None
        try:
            for row in super().__iter__():
                epoch = self._iterator
                yield row
        except RuntimeError:  # streaming raises it for a failure of a thread
            if self.failure is None:
                raise
        finally:
            if epoch is not None:
                epoch.non_blocking_exit()
        if self.failure is not None:
            raise self.failure

    def _end_threads_at_exit(self) -> None:
        """Let this process exit while a thread waits for a shard.

        streaming's thread waits without looking whether the epoch has ended. So a data worker does not exit if another
        one failed to prepare the shard, and the rank waits for it. No upstream issue is known.
        """
        if not hasattr(self, "_event"):  # which streaming creates in the first epoch
            self._event = threading.Event()
            threading._register_atexit(self._event.set)  # type: ignore[attr-defined]  # streaming uses it too

    def _prepare_thread(self, it: EpochIterator) -> None:
        with _counted(it):
            super()._prepare_thread(it)

    def _ready_thread(self, it: EpochIterator) -> None:
        with _counted(it):
            super()._ready_thread(it)


@contextmanager
def _counted(epoch: EpochIterator) -> Iterator[None]:
    """Count a thread that fails as one that has ended.

    streaming does not, and waits for it forever before the next epoch. No upstream issue is known.
    """
    try:
        yield
    except BaseException:
        epoch.on_exit()
        raise
