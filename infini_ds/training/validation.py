"""Loss on the validation rows, by position in the sequence, with the memory and with the memory switched off."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from infini_ds.data.streams import ValidationRows
from infini_ds.model import InfiniGPTNeoForCausalLM


@dataclass(frozen=True)
class PositionLosses:
    """Sums over rows: `loss[t]` of predicting the token at position t + 1, in nats, and `count[t]` of such tokens."""

    loss: Tensor  # (T - 1,) fp64
    count: Tensor  # (T - 1,)

    @property
    def mean(self) -> float:
        return (self.loss.sum() / self.count.sum()).item()


@torch.no_grad()
def position_losses(
    model: InfiniGPTNeoForCausalLM,
    rows: ValidationRows,
    limit: int | None,
    micro_rows: int,
    use_memory: bool = True,
    on_batch=lambda: None,
    leave=lambda: False,
) -> PositionLosses | None:
    """Over the first `limit` rows, shared out among the ranks; every rank gets the whole result.

    The result depends neither on the number of ranks nor on `micro_rows`, which is how many rows run at once. Before
    each batch `leave` is asked, as often on every rank: once it is true, the result is None.
    """
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    was_training = model.training
    model.eval()
    total = None
    batches = rows.batches(micro_rows, limit, rank, world_size)
    rows_of_first_rank = math.ceil(min(limit or len(rows), len(rows)) / world_size)  # no rank has more
    for _ in range(math.ceil(rows_of_first_rank / micro_rows)):
        if leave():
            model.train(was_training)
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
            total[1] += (part["labels"][:, 1:] != -100).sum(0)
        on_batch()
    model.train(was_training)
    if distributed:
        total = _sum_over_ranks(total, rows, model.device)
    return PositionLosses(*total.cpu())


def _sum_over_ranks(total: Tensor | None, rows: ValidationRows, device: torch.device) -> Tensor:
    if total is None:  # fewer rows than ranks
        T = len(rows[0]["input_ids"])
        total = torch.zeros(2, T - 1, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total
