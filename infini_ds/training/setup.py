"""From a recipe to the parts that the loop needs: model, data, engine, and where the run goes on."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from data_prep.options import byte_count
from infini_ds.checkpoint import manager as checkpoints
from infini_ds.checkpoint.manifest import TrainState
from infini_ds.config.deepspeed_config import deepspeed_config, default_file
from infini_ds.config.model_config import block_schedule, check_vocabulary, model_config
from infini_ds.config.recipe import BatchShape, Recipe, batch_shape
from infini_ds.data.sources import Source, check_cache_limit, find_sources
from infini_ds.data.streams import AHEAD, TrainingStream, ValidationRows, check_fingerprint, fingerprint
from infini_ds.distributed.environment import DistEnv
from infini_ds.distributed.parallel_dims import ParallelDims
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.planning.memory_estimate import Workload, ZeroSharding
from infini_ds.streaming_compat.shared_memory import one_start_at_a_time
from infini_ds.training.model_builder import build_model, fitting_block
from infini_ds.training.universal_loading import DeepSpeedCheckpoints
from infini_ds.utils.errors import UserError
from infini_ds.utils.rng import seed_everything
from infini_ds.utils.run_lock import acquire_run_lock

# What may differ between the recipe that began a run and the one that goes on with it.
MAY_CHANGE = (
    *("name", "output", "steps", "resume", "log_every", "timeout_minutes", "deepspeed", "schedule", "validation"),
    *("data.path", "data.streams", "data.cache", "data.cache_limit", "data.workers"),  # the fingerprint is compared
    *(
        "checkpoint",
        "stability",
        "guard",
        "batch.micro_rows",
        "model.segments_per_block",
        "model.gradient_checkpointing",
    ),
    *("model.checkpoint_layers", "model.offload_states", "model.attention", "model.compile", "plan"),
)


@dataclass
class Training:
    """All that the loop works on."""

    recipe: Recipe
    process: DistEnv
    shape: BatchShape
    precision: str
    sequence_length: int
    engine: object
    stream: TrainingStream
    validation: ValidationRows
    state: TrainState
    resumed_from: Path | None
    claim: TextIO | None  # of the first rank, on the run's folder; closed when the training ends

    @property
    def model(self) -> InfiniGPTNeoForCausalLM:
        return self.engine.module


def choose_precision(asked: str, device: torch.device) -> str:
    """bf16 on a GPU that has it, else fp32; bf16 without native instructions is hundreds of times slower than fp32."""
    if asked != "auto":
        return asked
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def newest_checkpoint(recipe: Recipe, data: dict) -> Path | None:
    """The checkpoint to go on from, the same on all ranks.

    Raises:
        UserError: there is one, but the recipe asks for a new run or makes other numbers; or all are damaged.
    """
    found = [checkpoints.complete_checkpoints(recipe.folder)]
    dist.broadcast_object_list(found)  # of the first rank: a shared file system may show others less
    if found[0] and not recipe.resume:
        raise UserError(
            f"resume=false, but {recipe.folder} holds checkpoints: choose another name=, or remove that folder"
        )
    if found[0]:
        check_same_run(recipe, data)
    return checkpoints.newest_intact(recipe.folder)


def set_up(recipe: Recipe, process: DistEnv) -> Training | None:
    """Check everything that can be wrong, then build, connecting the processes on the way. None: nothing is left to do.

    Raises:
        UserError: the recipe does not fit the data, the ranks, or the run that it is to go on with.
    """
    sources = find_sources(recipe.data.path, recipe.data.streams, recipe.data.cache)
    manifest = sources[0].manifest
    shape = batch_shape(recipe.batch, manifest.sequence_length, process.world_size)
    cache_limit = None if recipe.data.cache_limit is None else byte_count(recipe.data.cache_limit)
    if cache_limit is not None:
        readers = process.local_world_size * max(1, recipe.data.workers)
        check_cache_limit(sources, cache_limit, readers * AHEAD * shape.rank_rows)
    precision = choose_precision(recipe.precision, process.device)
    file = default_file(process.device.type) if recipe.deepspeed == "auto" else Path(recipe.deepspeed)
    ds_config = deepspeed_config(file, recipe, shape, precision)
    config, schedule = model_config(recipe, manifest), block_schedule(recipe)
    if recipe.model.attention == "flex_attention" and process.device.type == "cpu":
        raise UserError(
            "model.attention=flex_attention trains on GPUs alone, since PyTorch has no backward pass of it on the CPU: "
            "take model.attention=sdpa"
        )
    if process.device.type == "cuda" and precision == "bf16":
        # Only the memory's products are left in fp32: TF32 keeps more digits of their bf16 factors than bf16 has.
        torch.set_float32_matmul_precision("high")
    check_vocabulary(recipe, sources[0].folder / "tokenizer")
    data = fingerprint(sources, shape.rows, recipe.data.seed)

    held = acquire_run_lock(recipe.folder) if process.is_first else None

    from infini_ds.training.engine import build_engine, connect

    connect(process, recipe.timeout_minutes)
    newest = newest_checkpoint(recipe, data)
    state = checkpoints.read_manifest(newest).state if newest else TrainState()
    if state.step >= recipe.steps:
        return None
    if recipe.model.segments_per_block == "auto":
        work = Workload.of(recipe, config, shape, manifest.sequence_length, precision)
        sharding = ZeroSharding.from_json(ds_config, process.world_size)
        schedule = replace(schedule, segments_per_block=fitting_block(work, sharding, process))
    if process.is_first:
        describe_run(recipe, sources, data)
    with one_start_at_a_time(process.local_rank == 0):
        stream = TrainingStream(sources, shape.rank_rows, recipe.data.seed, recipe.data.workers, cache_limit)
        validation = ValidationRows(sources)
    model = build_model(recipe, config, schedule)
    engine = build_engine(model, recipe, ds_config)
    seed_everything(recipe.seed + 1 + process.rank)  # dropout differs between ranks
    if newest:
        _, data_state = checkpoints.load(
            DeepSpeedCheckpoints(engine), newest, ParallelDims(process.world_size, process.rank)
        )
        stream.load_state_dict(data_state)
    return Training(
        recipe, process, shape, precision, manifest.sequence_length, engine, stream, validation, state, newest, held
    )


def check_same_run(recipe: Recipe, data: dict) -> None:
    """Raise a UserError if the run's folder was begun with a recipe, or with data, that makes other numbers."""
    now, defaults = _flatten(asdict(recipe)), _flatten(asdict(Recipe()))  # a key may be younger than the run
    begun = defaults | _flatten(OmegaConf.to_container(OmegaConf.load(recipe.folder / "recipe.yaml")))
    for key in now | begun:
        before, value = begun.get(key, "the default"), now.get(key, "the default")
        if not any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE) and value != before:
            raise UserError(
                f"{key}={value}, but the run in {recipe.folder} was begun with {key}={before}: choose another name=, "
                f"or give {key}={before} to go on with it"
            )
    described = json.loads((recipe.folder / "data_manifest.json").read_text())
    if "fingerprint" in described:  # runs were begun before there was one
        check_fingerprint(described["fingerprint"], data)


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def describe_run(recipe: Recipe, sources: list[Source], data: dict) -> None:
    """Write into the run's folder what it is: its recipe, and the data's fingerprint, manifests and tokenizer."""
    recipe.folder.mkdir(parents=True, exist_ok=True)
    partial = recipe.folder / "recipe.yaml.partial"
    OmegaConf.save(OmegaConf.structured(recipe), partial)
    os.replace(partial, recipe.folder / "recipe.yaml")
    streams = [
        {"folder": str(source.folder), "remote": source.remote, "manifest": asdict(source.manifest)}
        for source in sources
    ]
    partial = recipe.folder / "data_manifest.json.partial"
    partial.write_text(json.dumps({"fingerprint": data, "streams": streams}, indent=1))
    os.replace(partial, recipe.folder / "data_manifest.json")
    shutil.copytree(sources[0].folder / "tokenizer", recipe.folder / "tokenizer", dirs_exist_ok=True)
