"""Training rows as an endless stream that can be saved and resumed, and validation rows by number."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from infini_ds.data.batches import Batch, collate
from infini_ds.data.cache_limit import PREFETCH_BATCHES
from infini_ds.data.fingerprint import fingerprint
from infini_ds.data.sources import DataSource
from infini_ds.data.workers import init_worker
from infini_ds.streaming_compat.dataset import ShardDataset
from infini_ds.streaming_compat.library import World
from infini_ds.streaming_compat.loader import BatchLoader
from infini_ds.streaming_compat.stream import ShardError, ShardStream
from infini_ds.utils.errors import UserError, first_line


def _open(
    sources: Sequence[DataSource], split: str, weighted: bool, cache_limit: int | None = None, **options: Any
) -> ShardDataset:
    """Return the dataset of a split of all sources; `options` are those of `StreamingDataset`."""
    streams = []
    for source in sources:
        weights = {"proportion": source.proportion, "repeat": source.repeat} if weighted else {}
        streams.append(
            ShardStream(
                remote_folder=source.remote,
                local=str(source.folder),
                split=split,
                bounded=cache_limit is not None,
                **{name: value for name, value in weights.items() if value is not None},
            )
        )
    if cache_limit is not None:
        options |= {"cache_limit": cache_limit, "predownload": (PREFETCH_BATCHES - 1) * options["batch_size"]}
    return ShardDataset(streams=streams, num_canonical_nodes=1, **options)


class TrainingStream:
    """Endless batches of `rows` rows for this rank, shuffled again in each epoch.

    The global batches, and their order, are the same for any number of ranks and workers. An epoch consists of complete
    global batches: the rows that do not fill one, others in each epoch, are left out.

    Args:
        rows: rows of a batch on this rank.
        workers: data worker processes; 0 to read in this process.
        cache_limit: bytes that shards of remote sources may take on this node; None for no limit.
        data_rank, data_size: which part of each global batch this rank reads, and the number of parts. Consecutive
            ranks with the same `data_rank` read the same rows.
        first_row: number of the first row of the data.
    Attributes:
        waited: seconds in which the next batch was not ready yet.
    Raises:
        UserError: the sources hold fewer rows than one global batch.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        rows: int,
        seed: int,
        workers: int,
        cache_limit: int | None = None,
        data_rank: int = 0,
        data_size: int = 1,
        first_row: int = 0,
    ):
        self.waited = 0.0
        self._arguments = (sources, rows, seed, workers, cache_limit, data_rank, data_size, first_row)
        # streaming finds rank and world size by itself. `replication` tells it how many ranks read the same rows.
        replication = World.detect().num_ranks // data_size
        self.dataset = _open(
            sources,
            "train",
            weighted=True,
            cache_limit=cache_limit,
            shuffle=True,
            shuffle_seed=seed,
            batch_size=rows,
            replication=replication if replication > 1 else None,
        )
        found = self.dataset.data_rank_and_size
        assert found == (data_rank, data_size), f"streaming reads with data rank and size {found}"
        global_rows = rows * data_size
        if self.dataset.epoch_size < global_rows:
            where = ", ".join(f"{source.option}={source.folder}" for source in sources)
            raise UserError(
                f"{where} has {self.dataset.epoch_size} training rows, fewer than the {global_rows} rows of one step: "
                "train on fewer rows or tokens a step, or prepare more text"
            )
        # Otherwise streaming fills the last batch of an epoch with repeated rows on some ranks, and omits it on others.
        self.dataset.epoch_size -= self.dataset.epoch_size % global_rows
        self.fingerprint = fingerprint(sources, global_rows, seed)
        self.loader = BatchLoader(
            self.dataset,
            batch_size=rows,
            collate_fn=partial(collate, first_row=first_row),
            num_workers=workers,
            worker_init_fn=init_worker,
            persistent_workers=workers > 0,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that an iterator does not draw from torch's random numbers
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's part of each global batch.

        Raises:
            UserError: a shard cannot be read, or a data worker died.
        """
        batches = iter(self.loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:  # the epoch is over; one that was resumed at its end is empty
                batches = iter(self.loader)
                continue
            except (ShardError, RuntimeError) as error:
                raise _as_user_error(error) from error
            finally:
                self.waited += time.perf_counter() - asked
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch."""
        return (self.loader.state_dict() or {}) | {"fingerprint": self.fingerprint}

    def at(self, state: dict[str, Any]) -> "TrainingStream":
        """Return a new stream of the same rows at the position `state`.

        A stream that has been read cannot return to an earlier position: streaming ignores a state that is loaded into
        a dataset after the first batch (https://github.com/mosaicml/streaming/issues/437).
        """
        stream = TrainingStream(*self._arguments)
        stream.load_state_dict(state)
        return stream

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position. Call this before the first batch.

        Raises:
            UserError: the state is of other data, or of other global batches.
        """
        if state.get("fingerprint", self.fingerprint) != self.fingerprint:  # states of earlier versions have none
            raise UserError(
                "the checkpoint was saved with other training data, another seed of it or other rows a step: resume "
                "with those that the run began with, or start a new run"
            )
        self.loader.load_state_dict({name: value for name, value in state.items() if name != "fingerprint"})


def _as_user_error(error: Exception) -> Exception:
    """Return the sentence for what ended the reading, or the error as it is.

    The message of an error from a worker process holds that process's stack; its last line is the sentence.
    """
    if isinstance(error, ShardError):
        return ShardError(str(error).strip().splitlines()[-1].rpartition(f"{ShardError.__name__}: ")[2])
    if "DataLoader worker" in str(error) and "Original Traceback" not in str(error):
        return UserError(
            f"a data worker process died ({first_line(error)}), most often because memory or /dev/shm was full: "
            "use fewer data workers, or give the job more memory"
        )
    return error


class ValidationRows:
    """The validation rows: the first of each source, then the second of each, and so on."""

    def __init__(self, sources: Sequence[DataSource]):
        self._dataset = _open(sources, "validation", weighted=False, shuffle=False, batch_size=1)
        number_in_source = np.concatenate([np.arange(n) for n in self._dataset.samples_per_stream])
        self._order = np.argsort(number_in_source, kind="stable")
        self._ready: set[int] = set()  # shards

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a row as MDS stores it: `input_ids` (T,), `document_lengths`."""
        row = int(self._order[number])
        shard, _ = self._dataset.spanner[row]
        if shard not in self._ready:
            self._dataset.prepare_shard(shard)
            self._ready.add(shard)
        return self._dataset[row]

    def documents(self, start_id: int) -> list[tuple[int, int]]:
        """Return (first, last) document of each row, numbered over all sources. Rows with equal numbers share one.

        Reads all rows.

        Args:
            start_id: the token that each document begins with.
        """
        spans, last = [(0, 0)] * len(self), -1
        first_rows = set(np.cumsum([0, *self._dataset.samples_per_stream]).tolist())  # of each source
        for number in np.argsort(self._order, kind="stable").tolist():  # one source after the other
            row = self[number]
            continues = int(row["input_ids"][0]) != start_id and int(self._order[number]) not in first_rows
            first = last if continues else last + 1
            last = first + len(row["document_lengths"]) - 1
            spans[number] = (first, last)
        return spans

    def batches(self, rows: int, limit: int | None, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield batches of up to `rows` rows of this rank's part of the first `limit` rows (None: all)."""
        mine = range(rank, min(limit or len(self), len(self)), world_size)
        for first in range(0, len(mine), rows):
            yield collate([self[i] for i in mine[first : first + rows]])
