"""Build the trainer of a resolved recipe: data, model, engine and hooks, resumed from the newest checkpoint."""

import logging
from dataclasses import replace
from pathlib import Path

from infini_ds.checkpoint import manager as checkpoints
from infini_ds.checkpoint.manifest import TrainState, complete_checkpoints, read_manifest
from infini_ds.config.resolve import ResolvedRun
from infini_ds.config.resume import check_same_run
from infini_ds.config.run_description import write_run_description
from infini_ds.data.skip_rows import SkipRows
from infini_ds.data.streams import ValidationRows
from infini_ds.distributed.collectives import broadcast_from_rank_zero
from infini_ds.distributed.signals import GracefulShutdown
from infini_ds.metrics.memory_diagnostics import hint_on_slow_gates
from infini_ds.model import SequenceGroup
from infini_ds.planning.fitting_block import fitting_block
from infini_ds.planning.memory_estimate import Workload, ZeroSharding
from infini_ds.streaming_compat.stale_memory import one_start_at_a_time
from infini_ds.training.checkpointing import Checkpointing
from infini_ds.training.curriculum import all_recall_tasks, describe_stage, open_stream
from infini_ds.training.engine import Engine
from infini_ds.training.gradient_check import GradientCheck
from infini_ds.training.hooks import Hook
from infini_ds.training.metrics_logger import MetricsLogger
from infini_ds.training.model_builder import build_model, set_matmul_precision
from infini_ds.training.recall import RecallExamples, draw_examples
from infini_ds.training.stability import Stability
from infini_ds.training.trainer import Trainer
from infini_ds.utils.counts import short_count
from infini_ds.utils.errors import UserError
from infini_ds.utils.pretrained import load_tokenizer_files
from infini_ds.utils.rng import seed_everything

logger = logging.getLogger(__name__)


def build_trainer(run: ResolvedRun, shutdown: GracefulShutdown | None = None) -> Trainer | None:
    """Build the trainer of a run and load its newest checkpoint. Returns None if the run is complete.

    Call it on all ranks, inside `connect`, with the run's lock taken.

    Raises:
        UserError: the run was begun with another recipe or other data, its checkpoints are damaged, or a rank has too
            little memory.
    """
    recipe, dims, schedule = run.recipe, run.dims, run.block_schedule
    newest = newest_checkpoint(run)
    state = read_manifest(newest).state if newest else TrainState()
    run = run.at_stage(state.stage)
    if state.step >= recipe.steps:
        logger.info(f"{recipe.folder} has run all of its {recipe.steps} steps: nothing to do; raise steps= to train on")
        return None
    set_matmul_precision(run.precision, run.environment.device)
    if recipe.model.segments_per_block == "auto":
        largest = run.at_largest_stage()
        work = Workload.of(recipe, run.model_config, largest.batch_shape, largest.sequence_length, run.precision)
        sharding = ZeroSharding.from_json(run.deepspeed, dims.world_size)
        schedule = replace(schedule, segments_per_block=fitting_block(work, sharding, run.environment))
    if dims.rank == 0:
        write_run_description(run)
    examples = recall_examples(run)
    stability = Stability(recipe)
    with one_start_at_a_time(run.environment.local_rank == 0):
        stream = open_stream(run)
        validation = ValidationRows(list(run.stages[-1].sources))
    model = build_model(recipe, run.model_config, schedule)
    if dims.sequence > 1:
        model.sequence_group = SequenceGroup(dims.sequence_group, dims.sequence_rank, dims.sequence)
    engine = Engine(model, recipe, run.deepspeed)
    seed_everything(recipe.seed + 1 + dims.rank)  # dropout differs between ranks
    if newest:
        state, data_state = checkpoints.load(engine, newest, dims)
        stream.load_state_dict(data_state)
    hooks: list[Hook] = [stability, MetricsLogger(), Checkpointing()]
    if recipe.stability.check_gradients:
        hooks.append(GradientCheck())
    batches, shutdown = SkipRows(stream, stability.rows_to_skip), shutdown or GracefulShutdown()
    trainer = Trainer(run, engine, batches, validation, state, shutdown, newest, hooks, examples)
    log_summary(trainer)
    return trainer


def newest_checkpoint(run: ResolvedRun) -> Path | None:
    """Return the checkpoint to resume from, the same on all ranks; None for a new run.

    Raises:
        UserError: there is one, but the recipe asks for a new run or gives other results; or all are damaged.
    """
    recipe = run.recipe
    if broadcast_from_rank_zero(lambda: bool(complete_checkpoints(recipe.folder))):
        if not recipe.resume:
            raise UserError(
                f"resume=false, but {recipe.folder} holds checkpoints: choose another name=, or remove that folder"
            )
        assert run.data_fingerprint is not None, "training needs data"
        check_same_run(recipe, run.data_fingerprint)
    return checkpoints.newest_intact(recipe.folder)


def recall_examples(run: ResolvedRun) -> dict[str, RecallExamples]:
    """Return the examples of each recall task that validations measure, in the tokens of the data.

    Raises:
        UserError: the tokenizer splits every word of the filler.
    """
    tasks, source = all_recall_tasks(run), run.sources[0]
    if not tasks:
        return {}
    folder = source.folder / "tokenizer"
    tokenizer = load_tokenizer_files(folder, f"{source.option}={source.folder}")
    start_id = source.manifest.tokenizer.start_id
    try:
        return draw_examples(tasks, run.recipe.validation.recall_examples, tokenizer, start_id)
    except UserError as error:
        option = "validation.recall" if run.recipe.validation.recall else "data.curriculum"
        raise UserError(f"{option}: recall of {tasks[0]}: {str(error).removeprefix('recall: ')}") from error


def log_summary(trainer: Trainer) -> None:
    """Log what is about to be trained, and on what."""
    run, recipe, shape = trainer.run, trainer.recipe, trainer.run.batch_shape
    parameters = sum(p.numel() for p in trainer.model.parameters())
    segments = trainer.model.block_schedule.segments_per_block or "all"
    ranks = f"{run.dims.world_size} ranks" + (f" ({run.dims.sequence} on each row)" if run.dims.sequence > 1 else "")
    logger.info(
        f"{recipe.name}: {short_count(parameters)} parameters, {recipe.steps} steps of {shape.rows} rows of "
        f"{run.sequence_length} tokens in segments of {trainer.model.config.segment_length}, {segments} at once; "
        f"{ranks} x {shape.accumulation} micro-batches x {shape.micro_rows} rows, {run.precision} "
        f"on {trainer.device.type}"
    )
    if len(run.stages) > 1:
        logger.info(f"stage {run.stage + 1} of {len(run.stages)}: {describe_stage(run, run.stage)}")
    if hint := hint_on_slow_gates(recipe):
        logger.info(hint)
    if trainer.latest_checkpoint:
        logger.info(f"resumed from {trainer.latest_checkpoint}: {trainer.state.tokens:,} tokens seen")
