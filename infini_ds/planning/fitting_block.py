"""Choose the block size for the memory that is free when a run starts."""

import torch
import torch.distributed as dist

from infini_ds.distributed.environment import DistEnv
from infini_ds.planning.hardware import memory_free
from infini_ds.planning.memory_estimate import HEADROOM, Workload, ZeroSharding, estimate_memory, largest_block
from infini_ds.utils.errors import UserError


def fitting_block(work: Workload, sharding: ZeroSharding, environment: DistEnv) -> int:
    """Return the most segments of a block that fit into the memory of every rank, for `segments_per_block: auto`.

    Raises:
        UserError: on a rank not even blocks of one segment fit.
    """
    limit = int(memory_free(environment) * (1 - HEADROOM))
    fits = torch.tensor([largest_block(work, sharding, limit) or 0, limit], device=environment.device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    segments, limit = fits.tolist()
    if not segments:
        least = estimate_memory(work.in_blocks_of(1), sharding).peak
        checkpointing = "" if work.checkpointing else ", set model.gradient_checkpointing=true"
        raise UserError(
            f"model.segments_per_block=auto: even blocks of one segment need {least / 2**30:.1f} GiB, and a rank has "
            f"{limit / 2**30:.1f} GiB: lower batch.micro_rows={work.rows}{checkpointing}, or plan the run first"
        )
    return segments
