"""The arrangement of ranks: arithmetic, and process groups between two gloo processes."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from infini_ds.distributed.environment import free_port
from infini_ds.distributed.parallel_dims import ParallelDims


@given(data=st.integers(1, 12), sequence=st.integers(1, 12))
def test_ranks_form_a_grid(data, sequence):
    world = [ParallelDims(data * sequence, rank, sequence) for rank in range(data * sequence)]
    places = [(dims.data_rank, dims.sequence_rank) for dims in world]
    assert places == [(d, s) for d in range(data) for s in range(sequence)]  # consecutive ranks share a sequence group
    for dims in world:
        assert (dims.data_size, dims.sequence) == (data, sequence)
        assert dims.data_ranks[dims.data_rank] == dims.rank == dims.sequence_ranks[dims.sequence_rank]
        assert {world[rank].data_rank for rank in dims.sequence_ranks} == {dims.data_rank}
        assert {world[rank].sequence_rank for rank in dims.data_ranks} == {dims.sequence_rank}
        assert len(dims.data_ranks) == data and len(dims.sequence_ranks) == sequence


@given(world_size=st.integers(1, 64), sequence=st.integers(-2, 80))
def test_sequence_has_to_divide_the_ranks(world_size, sequence):
    if sequence >= 1 and world_size % sequence == 0:
        assert ParallelDims(world_size, 0, sequence).data_size * sequence == world_size
    else:
        with pytest.raises(ValueError, match=f"sequence={sequence} does not divide the number of ranks, {world_size}"):
            ParallelDims(world_size, 0, sequence)


@given(world_size=st.integers(0, 8), rank=st.integers(-3, 12))
def test_rank_has_to_be_one_of_the_world(world_size, rank):
    if 0 <= rank < world_size:
        assert ParallelDims(world_size, rank).data_rank == rank
    else:
        with pytest.raises(ValueError, match=f"rank={rank} is not one of the ranks"):
            ParallelDims(world_size, rank)


def _sum_over_groups(rank: int, port: str, world_size: int, sequence: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    dims = ParallelDims(world_size, rank, sequence)
    for group, ranks in ((dims.data_group, dims.data_ranks), (dims.sequence_group, dims.sequence_ranks)):
        assert (group is None) == (sequence == 1)
        if sequence == 1 and ranks == [rank]:
            continue  # None stands for this rank alone
        total = torch.tensor(2.0**rank)
        dist.all_reduce(total, group=group)
        assert total == sum(2**other for other in ranks)
        if group is not None:
            assert dist.get_process_group_ranks(group) == ranks
    assert dims.data_group is dims.data_group and dims.sequence_group is dims.sequence_group
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size, sequence", [(2, 1), (2, 2), (4, 2)])
def test_groups_join_the_ranks_that_they_name(world_size, sequence):
    mp.spawn(_sum_over_groups, (free_port(), world_size, sequence), nprocs=world_size)
