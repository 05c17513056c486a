"""Work shared out among the ranks of a call and put together again, in the order that one rank alone would have."""

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from infini_ds.distributed.environment import DistEnv

PATIENCE = timedelta(hours=2)  # that ranks wait for the slowest one
Item = TypeVar("Item")


def init_gloo(process: DistEnv) -> None:
    """Join the ranks, if there are several. What they exchange are small results, so gloo serves on GPUs too."""
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    if process.world_size > 1:
        dist.init_process_group("gloo", timeout=PATIENCE, rank=process.rank, world_size=process.world_size)


def is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def is_local_rank_zero() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def split_across_ranks(items: list[Item]) -> list[Item]:
    """Every n-th item, for this one of n ranks."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather_items(mine: list[Item]) -> list[Item]:
    """What all ranks made of their shares, in the order of the items that were shared."""
    if not dist.is_initialized():
        return mine
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return [ranks[i % len(ranks)][i // len(ranks)] for i in range(sum(map(len, ranks)))]


def broadcast_object(value: Item | None) -> Item | None:
    """The first rank's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def all_reduce_sum(total: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of a tensor on the CPU."""
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
