"""Resolve a recipe: everything that follows from it, the prepared data and the ranks, checked before any work starts.

run = resolve(load_recipe("launch/recipes/tiny-cpu.yaml"), detect_environment())

Training, planning and the doctor share this function, so that they accept and refuse the same recipes.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from data_prep.manifest import NAME as MANIFEST_NAME
from data_prep.options import byte_count
from infini_ds.config.batch_shape import BatchShape, batch_shape
from infini_ds.config.deepspeed_config import deepspeed_config, default_file
from infini_ds.config.model_config import block_schedule, check_vocabulary, model_config
from infini_ds.config.recipe import Recipe
from infini_ds.config.stages import ResolvedStage, stage_ends
from infini_ds.config.training_data import check_cache_limit, find_sources, find_stages
from infini_ds.data.cache_limit import PREFETCH_BATCHES
from infini_ds.data.fingerprint import fingerprint
from infini_ds.data.sources import DataSource
from infini_ds.distributed.environment import DistEnv
from infini_ds.distributed.parallel_dims import ParallelDims
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig
from infini_ds.model.memory_rule import get_memory_rule
from infini_ds.utils.errors import UserError
from infini_ds.utils.pretrained import check_weight_files


@dataclass(frozen=True)
class ResolvedRun:
    """What a recipe comes to on the ranks of `environment`.

    Attributes:
        dims: how the ranks are arranged.
        stages: what is read; a single one without a curriculum.
        precision: "fp32" or "bf16".
        model_config: the model's configuration, with the vocabulary of the data if there are sources.
        block_schedule: the model's runtime schedule. `segments_per_block` is None for the recipe's "auto", which
            depends on the memory that is free when the run starts.
        data_fingerprint: what determines which rows are trained on and in which order; None without sources.
        cache_limit: bytes that training shards may take in the cache; None for no limit.
        stage: number of the stage, from 0, whose data and batch the properties below are; first stage first.
    """

    recipe: Recipe
    environment: DistEnv
    dims: ParallelDims
    stages: tuple[ResolvedStage, ...]
    precision: str
    model_config: InfiniGPTNeoConfig
    block_schedule: BlockSchedule
    data_fingerprint: dict[str, Any] | None
    cache_limit: int | None
    stage: int = 0

    @property
    def sources(self) -> tuple[DataSource, ...]:
        return self.stages[self.stage].sources

    @property
    def sequence_length(self) -> int:
        return self.stages[self.stage].sequence_length

    @property
    def batch_shape(self) -> BatchShape:
        return self.stages[self.stage].batch_shape

    @property
    def deepspeed(self) -> dict[str, Any]:
        return self.stages[self.stage].deepspeed

    @property
    def all_sources(self) -> tuple[DataSource, ...]:
        """The data of all stages."""
        return tuple(source for stage in self.stages for source in stage.sources)

    def at_stage(self, number: int) -> "ResolvedRun":
        """Return the run with its properties those of another stage."""
        return replace(self, stage=number)

    def at_largest_stage(self) -> "ResolvedRun":
        """Return the run at the stage whose micro-batches have the most tokens, and so take the most memory."""
        tokens = [stage.batch_shape.micro_rows * stage.sequence_length for stage in self.stages]
        return self.at_stage(tokens.index(max(tokens)))


def resolve(
    recipe: Recipe, environment: DistEnv, require_data: bool = True, device_type: str | None = None
) -> ResolvedRun:
    """Derive all parts of a run from its recipe, and check everything that can be wrong.

    Starts no process group, takes no lock and writes nothing but, into `data.cache`, the small files of remote data.

    Args:
        require_data: False for a plan: data that is not prepared yet is no error if `plan.sequence_length` is given,
            which then goes before the length of the data's rows, and neither the cache of this node nor the weights of
            `model.start_from` are checked.
        device_type: "cpu" or "cuda", for devices other than this machine's; a GPU is then taken to have bf16.
    Raises:
        UserError: the recipe does not fit the data, the ranks or the devices.
    """
    dims = _parallel_dims(recipe, environment)
    sources_of_stages = _find_sources(recipe, require_data)
    sources = sources_of_stages[0]
    manifest = sources[0].manifest if sources else None
    lengths = [_sequence_length(recipe, of_stage, require_data) for of_stage in sources_of_stages]
    shapes = [batch_shape(recipe.batch, length, dims.data_size, dims.sequence) for length in lengths]
    cache_limit = None if recipe.data.cache_limit is None else byte_count(recipe.data.cache_limit)
    if cache_limit is not None and require_data:
        readers = environment.local_world_size * max(1, recipe.data.workers)
        for of_stage, shape in zip(sources_of_stages, shapes, strict=True):
            check_cache_limit(list(of_stage), cache_limit, readers * PREFETCH_BATCHES * shape.rank_rows)
    if device_type is None:
        precision = choose_precision(recipe.precision, environment.device)
    else:
        native = "bf16" if device_type == "cuda" else "fp32"
        precision = native if recipe.precision == "auto" else recipe.precision
    kind = device_type or environment.device.type
    file = default_file(kind) if recipe.deepspeed == "auto" else Path(recipe.deepspeed)
    ds_configs = [deepspeed_config(file, recipe, shape, precision) for shape in shapes]
    config = model_config(recipe, manifest)
    if dims.sequence > 1:
        _check_division(recipe, config, min(lengths))
    if require_data and recipe.model.start_from is not None:
        check_weight_files(Path(recipe.model.start_from), f"model.start_from={recipe.model.start_from}")
    if recipe.model.attention == "flex_attention" and kind == "cpu":
        raise UserError(
            "model.attention=flex_attention needs a GPU, since PyTorch has no backward pass of it on the CPU: "
            "use model.attention=sdpa"
        )
    if sources:
        check_vocabulary(recipe, sources[0].folder / "tokenizer")
    first_rows = accumulate((sum(source.rows for source in of_stage) for of_stage in sources_of_stages), initial=0)
    parts = zip(sources_of_stages, lengths, shapes, ds_configs, stage_ends(recipe), first_rows, strict=False)
    return ResolvedRun(
        recipe=recipe,
        environment=environment,
        dims=dims,
        stages=tuple(ResolvedStage(*part) for part in parts),
        precision=precision,
        model_config=config,
        block_schedule=block_schedule(recipe),
        data_fingerprint=_fingerprint(recipe, sources_of_stages, shapes) if sources else None,
        cache_limit=cache_limit,
    )


def _parallel_dims(recipe: Recipe, environment: DistEnv) -> ParallelDims:
    ranks, sequence = environment.world_size, recipe.parallel.sequence
    if ranks % sequence:
        divisors = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UserError(
            f"parallel.sequence={sequence} does not divide the number of ranks, {ranks}: give one of {divisors}, or "
            f"start a multiple of {sequence} ranks"
        )
    return ParallelDims(ranks, environment.rank, sequence)


def _check_division(recipe: Recipe, config: InfiniGPTNeoConfig, sequence_length: int) -> None:
    """Raise a UserError unless the segments of a row can be divided over `parallel.sequence` ranks."""
    given = f"parallel.sequence={recipe.parallel.sequence}"
    segments = -(-sequence_length // config.segment_length)
    if segments < recipe.parallel.sequence:
        raise UserError(
            f"{given} is more than the segments of a row, {segments} ({sequence_length} tokens in segments of "
            f"{config.segment_length}), of which each rank needs one: lower it, or prepare longer rows"
        )
    if not get_memory_rule(config.memory_rule).can_be_divided:
        raise UserError(
            f"{given}, but model.memory_rule={config.memory_rule} cannot be divided over ranks, since it has no "
            "write_divided: give parallel.sequence=1"
        )


def choose_precision(asked: str, device: torch.device) -> str:
    """Return `asked`, or for "auto" bf16 on a GPU with native instructions for it, else fp32.

    Without native instructions bf16 is hundreds of times slower than fp32.
    """
    if asked != "auto":
        return asked
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def _find_sources(recipe: Recipe, require_data: bool) -> list[tuple[DataSource, ...]]:
    """Open the recipe's data, of each stage. Without `require_data`, return () as those of the only stage if any of
    it is not prepared on this machine.
    """
    data = recipe.data
    if not require_data and _unprepared(recipe):
        return [()]
    if data.curriculum:
        return [(source,) for source in find_stages([stage.path for stage in data.curriculum], data.cache)]
    return [tuple(find_sources(data.path, data.streams, data.cache))]


def _fingerprint(recipe: Recipe, sources: list[tuple[DataSource, ...]], shapes: list[BatchShape]) -> dict[str, Any]:
    """Return what determines the rows that are trained on: of the data, or of each stage of a curriculum."""
    of_stages = [
        fingerprint(list(of_stage), shape.rows, recipe.data.seed)
        for of_stage, shape in zip(sources, shapes, strict=True)
    ]
    return {"stages": of_stages} if recipe.data.curriculum else of_stages[0]


def _unprepared(recipe: Recipe) -> list[str]:
    """Return `key=path` of each stream or stage whose data is not a prepared folder of this machine."""
    paths = {f"data.streams[{i}].path": stream.path for i, stream in enumerate(recipe.data.streams)}
    paths |= {f"data.curriculum[{i}].path": stage.path for i, stage in enumerate(recipe.data.curriculum)}
    paths = paths or {"data.path": recipe.data.path}
    return [f"{key}={path}" for key, path in paths.items() if not Path(path, MANIFEST_NAME).is_file()]


def _sequence_length(recipe: Recipe, sources: tuple[DataSource, ...], require_data: bool) -> int:
    """Return the tokens of a row: those of the data, or, for a plan, what the recipe plans with."""
    if not require_data and recipe.plan.sequence_length is not None:
        return recipe.plan.sequence_length
    if sources:
        return sources[0].manifest.sequence_length
    raise UserError(
        f"{_unprepared(recipe)[0]} holds no prepared data, so the length of its rows is unknown: give "
        "plan.sequence_length=TOKENS (for a plan, --sequence-length)"
    )
