"""Loss on the validation rows, by position in the sequence, with the memory and with the memory off."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from infini_ds.data.streams import ValidationRows
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.loss import IGNORE_INDEX


@dataclass(frozen=True)
class PositionLosses:
    """Sums over rows: `loss[t]` of predicting the token at position t + 1, in nats, and `count[t]` of such tokens."""

    loss: Tensor  # (T - 1,) fp64
    count: Tensor  # (T - 1,)

    @property
    def mean(self) -> float:
        return (self.loss.sum() / self.count.sum()).item()


def gain_standard_error(on: PositionLosses, off: PositionLosses, segment_length: int) -> float:
    """Return the standard error of the mean gain `off.mean - on.mean`, from how it differs between segments.

    Gains of neighbouring tokens are alike, so a segment is one observation, weighted by its number of tokens (the
    variance of a ratio of sums). The first segments have less to gain, which makes the estimate larger, not smaller.
    0 if there is one segment, which has no memory.
    """
    gain, count = (
        torch.stack([part.sum() for part in sums.double().split(segment_length)])
        for sums in (off.loss - on.loss, on.count)
    )
    segments = int((count > 0).sum())
    if segments < 2:
        return 0.0
    deviations = gain - gain.sum() / count.sum() * count
    return (deviations.square().sum() * segments / (segments - 1)).sqrt().item() / count.sum().item()


@torch.no_grad()
def position_losses(
    model: InfiniGPTNeoForCausalLM,
    rows: ValidationRows,
    limit: int | None,
    micro_rows: int,
    use_memory: bool = True,
    on_batch: Callable[[], None] = lambda: None,
    abort: Callable[[], bool] = lambda: False,
) -> PositionLosses | None:
    """Return the losses on the first `limit` rows, which are split across the ranks, on every rank.

    The result depends neither on the number of ranks nor on `micro_rows`.

    Args:
        limit: number of rows; None for all.
        micro_rows: rows that a rank computes at once.
        use_memory: False switches the memory off.
        on_batch: called after each batch of this rank.
        abort: called before each batch, equally often on every rank; once it returns True, the result is None.
    """
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    total = None
    batches = rows.batches(micro_rows, limit, rank, world_size)
    rows_of_first_rank = math.ceil(min(limit or len(rows), len(rows)) / world_size)  # no rank has more
    with evaluating(model):
        for _ in range(math.ceil(rows_of_first_rank / micro_rows)):
            if abort():
                return None
            batch = next(batches, None)
            if batch is None:  # another rank has one more
                continue
            T = batch.input_ids.shape[1]
            if total is None:
                total = torch.zeros(2, T - 1, dtype=torch.float64, device=model.device)
            for part in batch.micro_batches(micro_rows, model.device):
                output = model(**part, use_memory=use_memory, loss_reduction="none", return_logits=False)
                total[0] += output.loss.double().sum(0)
                total[1] += (part["labels"][:, 1:] != IGNORE_INDEX).sum(0)
            on_batch()
    if total is None:  # fewer rows than ranks
        total = torch.zeros(2, len(rows[0]["input_ids"]) - 1, dtype=torch.float64, device=model.device)
    if distributed:
        dist.all_reduce(total)
    return PositionLosses(*total.cpu())


@contextmanager
def evaluating(model: InfiniGPTNeoForCausalLM) -> Iterator[None]:
    """Switch to evaluation of complete rows while the block runs.

    Ranks that share rows in training then read different ones: nothing is exchanged, and without gradients the memory
    of a block is all that a longer row needs.
    """
    was_training, group = model.training, model.sequence_group
    model.eval()
    model.sequence_group = None
    try:
        yield
    finally:
        model.train(was_training)
        model.sequence_group = group
