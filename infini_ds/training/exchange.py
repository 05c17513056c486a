"""The one exchange between the ranks in a step."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RankFigures:
    """What all ranks know after the exchange."""

    losses: list[float]  # each rank's part of the step's mean loss
    next_predicted_tokens: int  # of the next global batch
    stop_signal: int  # that a rank has received, 0 for none
    seconds_waited: list[float]  # for data, by each rank, in all steps since the start or the last rollback


class Exchange:
    """Gathers four numbers of every rank, once a step, between the backward pass and the optimizer step.

    The number of predicted tokens has to be known to all ranks before the forward pass. Each rank therefore reads its
    next batch one step ahead, and the number travels with the loss of the step before, not in an exchange of its own.

    The loss stays on the device until `figures` is read. On a GPU its copy to the host starts here, and DeepSpeed's
    step, which comes next, waits for the device in any case to see whether the gradient is finite; a step that is
    skipped has to be known before the optimizer changes the weights. `figures` read after it adds no wait.
    """

    def __init__(self, loss: Tensor, next_predicted_tokens: int, stop_signal: int, seconds_waited: float):
        """Start the exchange, on all ranks. `loss` is this rank's part of the mean loss, a scalar on its device."""
        others = torch.tensor([next_predicted_tokens, stop_signal, seconds_waited], dtype=torch.float64)
        mine = torch.cat([loss.double()[None], others.to(loss.device, non_blocking=True)])
        table = mine.new_empty(dist.get_world_size() * len(mine))
        dist.all_gather_into_tensor(table, mine)
        self._copied = None
        if table.is_cuda:
            pinned = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            table = pinned.copy_(table, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._table = table.view(-1, len(mine))

    @cached_property
    def figures(self) -> RankFigures:
        """The numbers of all ranks; waits for the loss if it is still being computed."""
        if self._copied is not None:
            self._copied.synchronize()
        losses, tokens, signals, waited = self._table.t().tolist()
        return RankFigures(losses, int(sum(tokens)), int(max(signals)), waited)
