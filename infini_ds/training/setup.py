"""From a recipe to the parts that the loop needs: model, data, engine, and where the run goes on."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from infini_ds.checkpoint import manager as checkpoints
from infini_ds.checkpoint.manifest import TrainState
from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.recipe import Recipe
from infini_ds.config.resolve import resolve
from infini_ds.config.resume import check_same_run
from infini_ds.data.sources import DataSource
from infini_ds.data.streams import TrainingStream, ValidationRows
from infini_ds.distributed.environment import DistEnv
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.planning.memory_estimate import Workload, ZeroSharding
from infini_ds.streaming_compat.stale_memory import one_start_at_a_time
from infini_ds.training.model_builder import build_model, fitting_block
from infini_ds.utils.errors import UserError
from infini_ds.utils.rng import seed_everything
from infini_ds.utils.run_lock import acquire_run_lock


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
    run = resolve(recipe, process)
    sources, shape, precision, config = list(run.sources), run.batch_shape, run.precision, run.model_config
    ds_config, data, schedule = run.deepspeed, run.data_fingerprint, run.block_schedule
    assert data is not None
    if process.device.type == "cuda" and precision == "bf16":
        # Only the memory's products are left in fp32: TF32 keeps more digits of their bf16 factors than bf16 has.
        torch.set_float32_matmul_precision("high")

    held = acquire_run_lock(recipe.folder) if process.is_first else None

    from infini_ds.training.engine import build_engine, connect

    connect(process, recipe.timeout_minutes)
    newest = newest_checkpoint(recipe, data)
    state = checkpoints.read_manifest(newest).state if newest else TrainState()
    if state.step >= recipe.steps:
        return None
    if recipe.model.segments_per_block == "auto":
        work = Workload.of(recipe, config, shape, run.sequence_length, precision)
        sharding = ZeroSharding.from_json(ds_config, process.world_size)
        schedule = replace(schedule, segments_per_block=fitting_block(work, sharding, process))
    if process.is_first:
        describe_run(recipe, sources, data)
    with one_start_at_a_time(process.local_rank == 0):
        stream = TrainingStream(
            sources,
            shape.rank_rows,
            recipe.data.seed,
            recipe.data.workers,
            run.cache_limit,
            data_rank=process.rank,
            data_size=process.world_size,
        )
        validation = ValidationRows(sources)
    model = build_model(recipe, config, schedule)
    engine = build_engine(model, recipe, ds_config)
    seed_everything(recipe.seed + 1 + process.rank)  # dropout differs between ranks
    if newest:
        _, data_state = checkpoints.load(engine, newest)
        stream.load_state_dict(data_state)
    return Training(
        recipe, process, shape, precision, run.sequence_length, engine, stream, validation, state, newest, held
    )


def describe_run(recipe: Recipe, sources: list[DataSource], data: dict) -> None:
    """Write into the run's folder what it is: its recipe, and the data's fingerprint, manifests and tokenizer."""
    recipe.folder.mkdir(parents=True, exist_ok=True)
    partial = recipe.folder / "recipe.yaml.partial"
    partial.write_text(recipe.to_yaml())
    os.replace(partial, recipe.folder / "recipe.yaml")
    streams = [
        {"folder": str(source.folder), "remote": source.remote, "manifest": asdict(source.manifest)}
        for source in sources
    ]
    partial = recipe.folder / "data_manifest.json.partial"
    partial.write_text(json.dumps({"fingerprint": data, "streams": streams}, indent=1))
    os.replace(partial, recipe.folder / "data_manifest.json")
    shutil.copytree(sources[0].folder / "tokenizer", recipe.folder / "tokenizer", dirs_exist_ok=True)
