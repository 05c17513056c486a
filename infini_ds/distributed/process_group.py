"""The process group of a training run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from infini_ds.distributed.environment import DistEnv
from infini_ds.utils.errors import UserError, first_line


@contextmanager
def connect(environment: DistEnv, timeout_minutes: float) -> Iterator[None]:
    """Join the run's ranks in a process group while the block runs; a group that exists already is used and left open.

    Enter it before any data stream is opened, since its constructor waits for the other ranks. A collective operation
    fails once it has waited `timeout_minutes` for another rank. After an error the group stays open: closing it could
    wait for a rank that is gone.

    Raises:
        UserError: the ranks did not find each other.
    """
    if dist.is_initialized():
        yield
        return
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    timeout = timedelta(minutes=timeout_minutes)
    # DeepSpeed creates further groups without a time limit; torch takes these defaults for them.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    backend = "nccl" if environment.device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, dist.DistError) as error:
        address = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {environment.rank} could not join the {environment.world_size} ranks at {address} within "
            f"timeout_minutes={timeout_minutes}: start every rank, and give an address of the first node that all "
            f"reach, with a free port ({first_line(error)})"
        ) from error
    yield
    dist.destroy_process_group()
