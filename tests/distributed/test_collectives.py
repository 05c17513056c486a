"""Object collectives between gloo processes, and without a process group."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from infini_ds.distributed import collectives
from infini_ds.distributed.environment import DistEnv, free_port
from infini_ds.utils.errors import UserError

ITEMS = [f"item {i}" for i in range(7)]  # not a multiple of the ranks


def check(rank: int, world_size: int) -> None:
    assert (collectives.rank(), collectives.world_size()) == (rank, world_size)
    assert collectives.is_rank_zero() == (rank == 0)
    mine = collectives.split_across_ranks(ITEMS)
    assert mine == ITEMS[rank::world_size]
    assert collectives.gather_items([item.upper() for item in mine]) == [item.upper() for item in ITEMS]
    assert collectives.all_gather_object({"rank": rank}) == [{"rank": other} for other in range(world_size)]
    assert collectives.broadcast_object(f"of rank {rank}") == "of rank 0"
    assert collectives.all_reduce_sum(torch.tensor([1.0, rank])).tolist() == [world_size, sum(range(world_size))]

    calls = []
    assert collectives.broadcast_from_rank_zero(lambda: calls.append(rank) or [rank, None]) == [0, None]
    assert collectives.broadcast_from_rank_zero(lambda: None) is None
    assert calls == ([0] if rank == 0 else [])
    with pytest.raises(UserError, match="resume=false: rank 0 found checkpoints"):
        collectives.broadcast_from_rank_zero(refuse)
    assert collectives.all_gather_object(rank) == list(range(world_size))  # they are still in step


def refuse() -> None:
    raise UserError(f"resume=false: rank {collectives.rank()} found checkpoints")


def test_without_a_process_group(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # other tests of this process leave one
    check(0, 1)


def _in_process(rank: int, port: str, world_size: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    collectives.init_gloo(DistEnv(rank, rank, world_size, world_size))
    check(rank, world_size)
    dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()


@pytest.mark.parametrize("world_size", [2, 3])
def test_between_processes(world_size, tmp_path):
    mp.spawn(_in_process, (free_port(), world_size, str(tmp_path)), nprocs=world_size)
    assert len(list(tmp_path.iterdir())) == world_size
