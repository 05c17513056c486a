"""The model that a recipe describes."""

import torch
import torch.distributed as dist

from infini_ds.config.recipe import Recipe
from infini_ds.distributed.environment import DistEnv
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.planning.hardware import memory_free
from infini_ds.planning.memory_estimate import HEADROOM, Workload, ZeroSharding, estimate_memory, largest_block
from infini_ds.utils.errors import UserError


def build_model(recipe: Recipe, config: InfiniGPTNeoConfig, schedule: BlockSchedule) -> InfiniGPTNeoForCausalLM:
    """The model with its first weights, the same on every rank: drawn from the recipe's seed, or read."""
    torch.manual_seed(recipe.seed)
    if recipe.model.start_from is not None:
        model = InfiniGPTNeoForCausalLM.from_pretrained(recipe.model.start_from, config=config, dtype=torch.float32)
    else:
        model = InfiniGPTNeoForCausalLM(config)
    model.block_schedule = schedule
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.model.compile:
        model.compile_layers()
    return model


def fitting_block(work: Workload, sharding: ZeroSharding, process: DistEnv) -> int:
    """`segments_per_block: auto`: the largest block that fits into the memory of every rank, the same on all of them.

    Raises:
        UserError: a rank has no room even for blocks of one segment.
    """
    room = int(memory_free(process) * (1 - HEADROOM))
    fits = torch.tensor([largest_block(work, sharding, room) or 0, room], device=process.device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    segments, room = fits.tolist()
    if not segments:
        least = estimate_memory(work.in_blocks_of(1), sharding).peak
        checkpointing = "" if work.checkpointing else ", set model.gradient_checkpointing=true"
        raise UserError(
            f"model.segments_per_block=auto: even blocks of one segment need {least / 2**30:.1f} GiB, and a rank has "
            f"{room / 2**30:.1f} GiB: lower batch.micro_rows={work.rows}{checkpointing}, or ask launch/plan.py"
        )
    return segments
