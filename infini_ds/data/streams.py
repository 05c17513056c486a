"""Training rows as an endless stream that can stop and go on, and validation rows by number."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.mosaic import StreamingDataLoader, StreamingDataset
from infini_ds.data.batches import collate
from infini_ds.data.workers import end_with_rank_only


def _open(folder: Path, split: str, **options) -> StreamingDataset:
    if not (folder / split / "index.json").is_file():
        raise ValueError(f"data.path={folder} has no {split}/index.json: prepare it with python -m data_prep")
    return StreamingDataset(local=str(folder), split=split, **options)


class TrainingStream:
    """Endless batches of `rows` rows for this rank, shuffled anew each epoch.

    The global batches, and their order, are the same for any number of ranks, but for an incomplete one at the end of
    an epoch, which one rank leaves out and several fill up. `state_dict` names the row at which the
    next batch starts; `load_state_dict` has to come before the first batch.

    Raises:
        ValueError: the folder holds no training shards, or fewer rows than one global batch.
    """

    def __init__(self, folder: Path, rows: int, seed: int, workers: int):
        self.folder = folder
        self.dataset = _open(
            folder,
            "train",
            shuffle=True,
            shuffle_seed=seed,
            batch_size=rows,
            num_canonical_nodes=1,
            validate_hash="xxh64",
        )
        global_rows = rows * (dist.get_world_size() if dist.is_initialized() else 1)
        if self.dataset.num_samples < global_rows:
            raise ValueError(
                f"data.path={folder} has {self.dataset.num_samples} training rows, fewer than one global batch of "
                f"{global_rows}: lower batch.rows or batch.tokens, or prepare more text"
            )
        self.loader = StreamingDataLoader(
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

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:  # an epoch each; one that was resumed at its very end is empty
            try:
                yield from self.loader
            except (ValueError, RuntimeError) as error:  # the latter if a thread of streaming met the shard first
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(
                    f"a shard of {self.folder} cannot be read ({reason}): prepare the data anew, with --force"
                ) from error

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.loader.load_state_dict(state)


class ValidationRows:
    """The validation rows, in their order; ranks share them out among themselves."""

    def __init__(self, folder: Path):
        self.dataset = _open(folder, "validation", shuffle=False, batch_size=1, num_canonical_nodes=1)

    def __len__(self) -> int:
        return self.dataset.num_samples

    def batches(self, rows: int, limit: int | None, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Tensor]]:
        """Batches of up to `rows` of this rank's share of the first `limit` rows (None: all)."""
        mine = range(rank, min(limit or len(self), len(self)), world_size)
        for first in range(0, len(mine), rows):
            yield collate([self.dataset[i] for i in mine[first : first + rows]])
