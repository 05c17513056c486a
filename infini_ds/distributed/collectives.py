"""Collectives on Python objects, and work that is split across ranks and combined in the order of a single rank.

Without a process group there is one rank, and each function returns what it was given. Every rank has to call these
functions in the same order.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from infini_ds.distributed.environment import DistEnv
from infini_ds.utils.errors import UserError

TIMEOUT = timedelta(hours=2)  # for which the ranks of an evaluation wait for the slowest one
T = TypeVar("T")


def init_gloo(environment: DistEnv) -> None:
    """Create a gloo process group if there are several ranks: for small results it serves on GPUs too."""
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    if environment.world_size > 1:
        dist.init_process_group("gloo", timeout=TIMEOUT, rank=environment.rank, world_size=environment.world_size)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    return rank() == 0


def is_local_rank_zero() -> bool:
    """Return whether this is the first rank of its node."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def all_gather_object(mine: T) -> list[T]:
    """Return every rank's object, in the order of the ranks."""
    if not dist.is_initialized():
        return [mine]
    gathered: list[T] = [mine] * dist.get_world_size()  # each is replaced by the object of its rank
    dist.all_gather_object(gathered, mine)
    return gathered


def broadcast_object(value: T) -> T:
    """Return rank 0's object; what the other ranks give is ignored."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def broadcast_from_rank_zero(read: Callable[[], T]) -> T:
    """Call `read` on rank 0 alone and return its result on every rank.

    For what is read from a shared file system, which may show other ranks an older state.

    Raises:
        UserError: `read` raised it; then every rank raises it, so that none waits for another. Any other exception is
            raised on rank 0 alone, and ends the run.
    """
    value: T | None = None
    error: UserError | None = None
    if is_rank_zero():
        try:
            value = read()
        except UserError as raised:
            error = raised
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # None only if `read` may return None


def split_across_ranks(items: list[T]) -> list[T]:
    """Return this rank's part of `items`: with n ranks, every n-th one."""
    return items[rank() :: world_size()]


def gather_items(mine: list[T]) -> list[T]:
    """Return the results of all ranks, in the order of the items that `split_across_ranks` split."""
    by_rank = all_gather_object(mine)
    return [by_rank[i % len(by_rank)][i // len(by_rank)] for i in range(sum(map(len, by_rank)))]


def all_reduce_sum(total: torch.Tensor) -> torch.Tensor:
    """Sum a CPU tensor over the ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
