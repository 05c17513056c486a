"""Count the bytes that a rank sends, at the collectives themselves."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Bytes that a rank sends to another in a ring of n ranks, as a multiple of the bytes that it gives to the collective.
SENT: dict[str, Callable[[int], float]] = {
    "c10d::_allgather_base_": lambda n: n - 1,
    "c10d::allgather_": lambda n: n - 1,
    "c10d::_reduce_scatter_base_": lambda n: (n - 1) / n,
    "c10d::reduce_scatter_": lambda n: (n - 1) / n,
    "c10d::allreduce_": lambda n: 2 * (n - 1) / n,
    "c10d::barrier": lambda n: 0,
}
GIVEN = {"c10d::allreduce_": 0, "c10d::barrier": 0}  # which argument a rank gives; otherwise the second


class CollectiveBytes(TorchDispatchMode):
    """Within `with CollectiveBytes() as counted:`, `counted` knows what this rank sends.

    torch.distributed calls an operator of the group for each collective, in the backward pass too.

    Attributes:
        sent: bytes, if each collective runs in a ring.
        calls: number of collectives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if func.namespace in ("c10d", "_c10d_functional"):
            if name not in SENT:
                raise NotImplementedError(f"{name} is not counted: add what it sends to SENT")
            given = sum(x.nbytes for x in tree_leaves(args[GIVEN.get(name, 1)]) if isinstance(x, Tensor))
            self.sent += round(SENT[name](_group_size(args)) * given)
            self.calls += 1
        return func(*args, **(kwargs or {}))


def _group_size(args: tuple[Any, ...]) -> int:
    """Return the number of ranks of the process group that is among an operator's arguments."""
    objects = [x for x in args if isinstance(x, torch.ScriptObject)]
    return dist.ProcessGroup.unbox(objects[0]).size()
