"""Build the model of a recipe."""

from pathlib import Path

import torch
import torch.distributed as dist

from infini_ds.config.recipe import Recipe
from infini_ds.distributed.environment import DistEnv
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.planning.hardware import memory_free
from infini_ds.planning.memory_estimate import HEADROOM, Workload, ZeroSharding, estimate_memory, largest_block
from infini_ds.utils.errors import UserError
from infini_ds.utils.pretrained import load_pretrained, read_config


def build_model(recipe: Recipe, config: InfiniGPTNeoConfig, schedule: BlockSchedule) -> InfiniGPTNeoForCausalLM:
    """Return the model with its initial weights, the same on every rank: from the recipe's seed, or from a folder.

    Raises:
        UserError: the folder's weights are damaged or incomplete.
    """
    torch.manual_seed(recipe.seed)
    if recipe.model.start_from is not None:
        model = _pretrained(Path(recipe.model.start_from), config)
    else:
        model = InfiniGPTNeoForCausalLM(config)
    model.block_schedule = schedule
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.model.compile:
        model.compile_layers()
    return model


def _pretrained(folder: Path, config: InfiniGPTNeoConfig) -> InfiniGPTNeoForCausalLM:
    """Return the model of model.start_from. A rule that the recipe changes starts with parameters of its own."""
    name = f"model.start_from={folder}"
    rule_changes = read_config(folder, name).get("memory_rule", config.memory_rule) != config.memory_rule
    may_lack = r"\.memory_parameters\." if rule_changes else None
    model: InfiniGPTNeoForCausalLM = load_pretrained(InfiniGPTNeoForCausalLM, folder, name, config, may_lack)
    return model


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
