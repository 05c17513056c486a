"""The training loop."""

from contextlib import closing, nullcontext

import torch
import torch.distributed as dist

from infini_ds.checkpoint import manager as checkpoints
from infini_ds.config.lr_schedule import gate_reach
from infini_ds.data.batches import Batch
from infini_ds.data.skip_rows import SkipRows
from infini_ds.distributed.signals import GracefulShutdown
from infini_ds.training.gradient_check import check_gradients
from infini_ds.training.metrics_logger import MetricsLogger
from infini_ds.training.setup import Training
from infini_ds.training.stability import RollbackReason, Stability, StepDecision
from infini_ds.training.validation import position_losses
from infini_ds.utils.progress import ProgressBar
from infini_ds.utils.rng import get_rng_states


def train(run: Training, stop: GracefulShutdown | None = None) -> bool:
    """Train from where the run stands to its last step, or until `stop`; returns whether the last step is made."""
    stop = stop or GracefulShutdown()
    stop.can_save = True
    guard, steps = Stability(run), run.recipe.steps
    bar = ProgressBar("training", steps, run.state.step, shown=run.process.is_first)
    with closing(run.claim) if run.claim else nullcontext(), bar as progress:
        announce(run, progress)
        while trouble := make_steps(run, guard, progress, stop):
            progress.say(guard.go_back(trouble))
            progress.go_back(run.state.step)
        if run.state.step < steps:
            progress.say(
                f"stopped by {stop.reason} at step {run.state.step} of {steps}: the same command goes on from there"
            )
    return run.state.step == steps


def make_steps(run: Training, guard: Stability, progress: ProgressBar, stop: GracefulShutdown) -> RollbackReason | None:
    """Train until the last step, or until `stop`, or until the run has to go back, for trouble that is returned."""
    recipe, state, trouble = run.recipe, run.state, None
    tokens = run.shape.rows * run.sequence_length
    with MetricsLogger(run, progress) as recorder:
        batches = iter(SkipRows(run.stream, guard.rows_to_skip))
        if validation_is_due(run):
            validate(run, recorder, stop)
        while state.step < recipe.steps and not stop.agreed:
            rates = run.engine.get_lr()
            batch = next(batches)
            guard.record_rows(batch)
            verdict, memory = train_step(run, batch, guard, stop)
            state.step += 1
            state.tokens += tokens
            trouble = guard.note(verdict, recorder)
            last = state.step == recipe.steps
            recorder.count(tokens)
            if state.step % recipe.log_every == 0 or last:
                figures = recorder.step(verdict.loss, memory, rates)
                progress.advance({"loss": f"{verdict.loss:.4f}", "tokens/s": f"{figures['speed/tokens_per_s']:,.0f}"})
            else:
                progress.advance()
            if trouble:
                break
            if not stop.agreed and validation_is_due(run):
                validate(run, recorder, stop)
            due = state.step % recipe.checkpoint.every == 0 and not verdict.empty  # else going back there were progress
            if due or last or stop.agreed:
                with recorder.paused():
                    data_state = run.stream.state_dict()
                    folder = checkpoints.save(run.engine, recipe.folder, state, data_state, recipe.checkpoint)
                guard.checkpoint_stands = True
                progress.say(f"step {state.step}: checkpoint in {folder}")
    return trouble


def train_step(run: Training, batch: Batch, guard: Stability, stop: GracefulShutdown) -> tuple[StepDecision, tuple]:
    """One optimizer step on this rank's rows, unless the verdict on it is to skip it; returns that, and the last rows'
    memory.

    The loss of a step is the mean over all of its predicted tokens, whichever rank or micro-batch they fall to.
    DeepSpeed averages gradients over ranks and micro-batches, so each part is divided by the mean tokens of a part.
    """
    from infini_ds.training.engine import step  # DeepSpeed, which takes seconds: once the recipe is checked

    shape, device = run.shape, run.process.device
    tokens = torch.tensor(batch.predicted_tokens, device=device)
    dist.all_reduce(tokens)
    parts = shape.data_size * shape.accumulation
    items = tokens.clamp(min=1) / parts  # of none, if all of its rows are passed over
    states = get_rng_states() if guard.checks_gradients else None
    share = torch.zeros((), device=device)
    for number, micro_batch in enumerate(batch.micro_batches(shape.micro_rows, device), 1):
        output = run.engine(**micro_batch, num_items_in_batch=items)
        run.engine.backward(output.loss)
        share += output.loss.detach().float() / parts
        if number < shape.accumulation:
            step(run.engine)
    verdict = guard.judge(share, tokens, stop)
    if guard.checks_gradients and not verdict.skip:
        check_gradients(run, batch, items, states)
        guard.checks_gradients = False
    step(run.engine, verdict.skip)
    return verdict, output.memory


def validation_is_due(run: Training) -> bool:
    """Also behind a resume, if the run was stopped before or in the validation of its checkpoint's step."""
    every, step = run.recipe.validation.every, run.state.step
    return every > 0 and run.state.validated != step and (step % every == 0 or step == run.recipe.steps)


def validate(run: Training, recorder: MetricsLogger, stop: GracefulShutdown) -> None:
    """Loss on the validation rows with and without the memory; left without a result if the run is to stop."""
    means = []
    with recorder.paused():
        for use_memory in (True, False):
            losses = position_losses(
                run.model,
                run.validation,
                run.recipe.validation.rows,
                run.shape.micro_rows,
                use_memory,
                leave=lambda: stop.agree(run.process.device),
            )
            if losses is None:
                return
            means.append(losses.mean)
    loss, without = means
    run.state.validated, run.state.validation_loss = run.state.step, loss
    recorder.validation(loss, without)


def announce(run: Training, progress: ProgressBar) -> None:
    """Say what is about to be trained, and on what."""
    config, shape = run.model.config, run.shape
    parameters = sum(p.numel() for p in run.model.parameters())
    progress.say(
        f"{run.recipe.name}: {parameters / 1e6:.1f}M parameters, {run.recipe.steps} steps of {shape.rows} rows of "
        f"{run.sequence_length} tokens in segments of {config.segment_length}, {run.model.block_schedule.segments_per_block or 'all'} at "
        f"once; {shape.data_size} ranks x "
        f"{shape.accumulation} micro-batches x {shape.micro_rows} rows, {run.precision} on {run.process.device.type}"
    )
    progress.say(f"each gate can move by {gate_reach(run.recipe):.1f} at most in all steps of this recipe")
    if run.resumed_from:
        progress.say(f"going on from {run.resumed_from}: {run.state.tokens:,} tokens seen")
