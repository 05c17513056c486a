"""A gather of a few numbers whose result is read later."""

import torch
import torch.distributed as dist
from torch import Tensor


class AsyncGather:
    """Gathers a vector of every rank; the host waits for the device only when the result is read, if at all."""

    def __init__(self, mine: Tensor):
        """Start the gather, on all ranks. `mine` has as many elements on every rank."""
        table = mine.new_empty(dist.get_world_size() * len(mine))
        dist.all_gather_into_tensor(table, mine)
        self._copied: torch.cuda.Event | None = None
        if table.is_cuda:  # page-locked memory, into which the device copies by itself
            host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            table = host.copy_(table, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._table = table.view(-1, len(mine))

    def read(self) -> list[list[float]]:
        """Return the vector of each rank. Waits until the device has computed and copied them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._table.tolist()
