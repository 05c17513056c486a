"""Training rows as an endless stream that can stop and go on, and validation rows by number."""

import time
from collections.abc import Iterator

import numpy as np
import torch

from infini_ds.data.batches import Batch, collate
from infini_ds.data.sources import Source
from infini_ds.streaming_compat.library import World
from infini_ds.streaming_compat.loader import BatchLoader
from infini_ds.streaming_compat.shards import ShardDataset, ShardError, ShardStream
from infini_ds.streaming_compat.workers import end_with_rank_only
from infini_ds.utils.errors import UserError

AHEAD = 3  # batches a reader that are asked for at a time where the cache is bounded: the one that is due, and the next


def _open(sources: list[Source], split: str, weighted: bool, cache_limit: int | None = None, **options) -> ShardDataset:
    streams = []
    for source in sources:
        weights = {"proportion": source.proportion, "repeat": source.repeat} if weighted else {}
        streams.append(
            ShardStream(
                far=source.remote,
                local=str(source.folder),
                split=split,
                bounded=cache_limit is not None,
                **{name: value for name, value in weights.items() if value is not None},
            )
        )
    if cache_limit is not None:
        options |= {"cache_limit": cache_limit, "predownload": (AHEAD - 1) * options["batch_size"]}
    return ShardDataset(streams=streams, num_canonical_nodes=1, **options)


class TrainingStream:
    """Endless batches of `rows` rows for this rank, shuffled anew each epoch.

    The global batches, and their order, are the same for any number of ranks and workers. An epoch is whole global
    batches: the rows that do not fill one, others in each epoch, are left out of it. `state_dict` names the row at
    which the next batch starts; `load_state_dict` has to come before the first batch. `waited` counts the seconds in
    which a batch was asked for and not there.

    Raises:
        UserError: the sources hold fewer rows than one global batch.
    """

    def __init__(
        self,
        sources: list[Source],
        rows: int,
        seed: int,
        workers: int,
        cache_limit: int | None = None,
        data_rank: int = 0,
        data_size: int = 1,
    ):
        self.waited = 0.0
        self._made_of = (sources, rows, seed, workers, cache_limit, data_rank, data_size)
        # streaming finds the ranks of the run by itself; it has to be told how many of them in a row share their rows.
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
        assert found == (data_rank, data_size), f"streaming reads as data rank and size {found}"
        global_rows = rows * data_size
        where = ", ".join(f"{source.key}={source.folder}" for source in sources)
        if self.dataset.epoch_size < global_rows:
            raise UserError(
                f"{where} has {self.dataset.epoch_size} training rows, fewer than one global batch of "
                f"{global_rows}: lower batch.rows or batch.tokens, or prepare more text"
            )
        # Otherwise the rest of an epoch is left out by one rank, and filled up to a batch with repeated rows by others.
        self.dataset.epoch_size -= self.dataset.epoch_size % global_rows
        self.fingerprint = fingerprint(sources, global_rows, seed)
        self.loader = BatchLoader(
            self.dataset,
            batch_size=rows,
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=end_with_rank_only,
            persistent_workers=workers > 0,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that an iterator does not draw from torch's random numbers
        )

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:  # an epoch is over; one that was resumed at its very end is empty
                batches = iter(self.loader)
                continue
            except (ShardError, RuntimeError) as error:
                raise _explained(error) from error
            finally:
                self.waited += time.perf_counter() - asked
            yield batch

    def state_dict(self) -> dict:
        return self.loader.state_dict() | {"fingerprint": self.fingerprint}

    def at(self, state: dict) -> "TrainingStream":
        """A new stream of the same rows that stands at `state`: one that has been read cannot be put back."""
        stream = TrainingStream(*self._made_of)
        stream.load_state_dict(state)
        return stream

    def load_state_dict(self, state: dict) -> None:
        """Raises UserError: the state is of other data, or of another global batch."""
        check_fingerprint(state.get("fingerprint", self.fingerprint), self.fingerprint)  # older ones have none
        self.loader.load_state_dict({name: value for name, value in state.items() if name != "fingerprint"})


def fingerprint(sources: list[Source], global_rows: int, seed: int) -> dict:
    """All that decides which rows the training sees, and in which order; not where they lie, nor who reads them."""
    return {"batch.rows": global_rows, "data.seed": seed, "streams": [source.fingerprint() for source in sources]}


def check_fingerprint(theirs: dict, ours: dict) -> None:
    """Raise a UserError if a run that was begun with `theirs` cannot go on with `ours`."""
    for key in ("batch.rows", "data.seed"):
        if theirs[key] != ours[key]:
            raise UserError(
                f"{key}={ours[key]}, but this run's rows are taken as with {key}={theirs[key]}: give that, or choose "
                "another name="
            )
    if theirs["streams"] == ours["streams"]:
        return
    if len(theirs["streams"]) != len(ours["streams"]):
        raise UserError(
            f"the recipe names {len(ours['streams'])} streams of data, but this run was begun with "
            f"{len(theirs['streams'])}: name those, or choose another name="
        )
    for number, (before, now) in enumerate(zip(theirs["streams"], ours["streams"], strict=True)):
        for what in ("proportion", "repeat"):
            if before[what] != now[what]:
                raise UserError(
                    f"data.streams[{number}].{what}={now[what]}, but this run was begun with {before[what]}: give "
                    "that, or choose another name="
                )
        if before["shards"] != now["shards"]:
            raise UserError(
                f"the data of {'stream ' + str(number) if number else 'this run'} have been made anew, with other "
                "content, since it was begun: choose another name=, or give the path of the data as they were"
            )


def _explained(error: Exception) -> Exception:
    """A sentence for what ended the reading; from a worker process it is the last line of that process's stack."""
    if isinstance(error, ShardError):
        return ShardError(str(error).strip().splitlines()[-1].rpartition(f"{ShardError.__name__}: ")[2])
    if "DataLoader worker" in str(error) and "Original Traceback" not in str(error):
        return UserError(
            f"a process that reads ahead has died ({str(error).splitlines()[0]}), most often for want of memory or of "
            "room in /dev/shm: lower data.workers, or give the job more"
        )
    return error


class ValidationRows:
    """The validation rows, the first of each source, then the second of each, and so on; ranks share them out."""

    def __init__(self, sources: list[Source]):
        self._dataset = _open(sources, "validation", weighted=False, shuffle=False, batch_size=1)
        in_its_source = np.concatenate([np.arange(n) for n in self._dataset.samples_per_stream])
        self._order = np.argsort(in_its_source, kind="stable")
        self._ready: set[int] = set()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """The row as MDS stores it: `input_ids` (T,), `document_lengths`."""
        row = int(self._order[number])
        shard, _ = self._dataset.spanner[row]
        if shard not in self._ready:
            self._dataset.prepare_shard(shard)
            self._ready.add(shard)
        return self._dataset[row]

    def documents(self, start_id: int) -> list[tuple[int, int]]:
        """(first, last) document of each row, numbered over all sources: two rows share one where these overlap. Reads
        all rows. `start_id`: the token that documents begin with.
        """
        spans, last = [(0, 0)] * len(self), -1
        begins = set(np.cumsum([0, *self._dataset.samples_per_stream]).tolist())  # rows that a source begins with
        for number in np.argsort(self._order, kind="stable").tolist():  # one source after the other
            row = self[number]
            goes_on = int(row["input_ids"][0]) != start_id and int(self._order[number]) not in begins
            first = last if goes_on else last + 1
            last = first + len(row["document_lengths"]) - 1
            spans[number] = (first, last)
        return spans

    def batches(self, rows: int, limit: int | None, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Batches of up to `rows` of this rank's share of the first `limit` rows (None: all)."""
        mine = range(rank, min(limit or len(self), len(self)), world_size)
        for first in range(0, len(mine), rows):
            yield collate([self[i] for i in mine[first : first + rows]])
