"""The training loop."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from infini_ds.data.batches import micro_batches, predicted_tokens
from infini_ds.training import checkpoints
from infini_ds.training.metrics import Metrics, gates, memory_metrics
from infini_ds.training.progress import ProgressBar
from infini_ds.training.schedule import gate_reach
from infini_ds.training.setup import Training
from infini_ds.training.stopping import Stop
from infini_ds.training.throughput import memory_in_use, peak_flops, training_flops_per_token
from infini_ds.training.validation import position_losses

WAITING = 0.1  # of the time, for data, from which on a run says so
SKIPPED_STEPS = 10  # in a row, without a finite gradient, before the run gives up


def train(run: Training, stop: Stop | None = None) -> bool:
    """Train from where the run stands to its last step, or until `stop`; returns whether the last step is made."""
    stop = stop or Stop()
    stop.at_work = True
    recipe, state, first = run.recipe, run.state, run.process.is_first
    metrics = Metrics(recipe.folder, state.step) if first else None
    meter = Meter(run)
    batches, skipped = iter(run.stream), 0
    with ProgressBar("training", recipe.steps, state.step, shown=first) as progress:
        announce(run, progress)
        if validation_is_due(run):
            with meter.paused():
                validate(run, metrics, progress, stop)
        while state.step < recipe.steps and not stop.agreed:
            rates = run.engine.get_lr()
            losses, memory = train_step(run, next(batches))
            state.step += 1
            skipped = 0 if run.engine.was_step_applied() else skipped + 1
            if skipped:
                progress.say(f"step {state.step}: a gradient was not finite, the step was skipped")
            if skipped == SKIPPED_STEPS:
                raise ValueError(
                    f"the last {skipped} steps up to {state.step} had no finite gradient: lower "
                    f"optimizer.learning_rate={recipe.optimizer.learning_rate}, in a run of another name="
                )
            state.tokens += run.shape.rows * run.sequence_length
            meter.count(run.shape.rows * run.sequence_length)
            last = state.step == recipe.steps
            if state.step % recipe.log_every == 0 or last:
                figures = log_step(run, metrics, meter, losses, memory, rates)
                if meter.waits_for_data(figures["data/wait_share"]):
                    progress.say(
                        f"step {state.step}: {figures['data/wait_share']:.0%} of the time goes by waiting for data: "
                        f"raise data.workers={recipe.data.workers}"
                    )
                progress.advance(
                    {"loss": f"{figures['train/loss']:.4f}", "tokens/s": f"{figures['speed/tokens_per_s']:,.0f}"}
                )
            else:
                progress.advance()
            with meter.paused():
                if not stop.agree(run.process.device) and validation_is_due(run):
                    validate(run, metrics, progress, stop)
                if state.step % recipe.checkpoint.every == 0 or last or stop.agreed:
                    data_state = run.stream.state_dict()
                    folder = checkpoints.save(run.engine, recipe.folder, state, data_state, recipe.checkpoint)
                    progress.say(f"step {state.step}: checkpoint in {folder}")
        if state.step < recipe.steps:
            progress.say(
                f"stopped by {stop.reason} at step {state.step} of {recipe.steps}: the same command goes on from there"
            )
    if metrics:
        metrics.close()
    return state.step == recipe.steps


def train_step(run: Training, batch: dict) -> tuple[torch.Tensor, tuple]:
    """One optimizer step on this rank's rows; returns this rank's share of the mean loss, and the last rows' memory.

    The loss of a step is the mean over all of its predicted tokens, whichever rank or micro-batch they fall to.
    DeepSpeed averages gradients over ranks and micro-batches, so each part is divided by the mean tokens of a part.
    """
    engine, shape = run.engine, run.shape
    tokens = torch.tensor(predicted_tokens(batch), device=run.process.device)
    dist.all_reduce(tokens)
    parts = shape.world_size * shape.accumulation
    share = torch.zeros((), device=run.process.device)
    for micro_batch in micro_batches(batch, shape.micro_rows, run.process.device):
        output = engine(**micro_batch, num_items_in_batch=tokens / parts)
        engine.backward(output.loss)
        engine.step()
        share += output.loss.detach().float() / parts
    return share, output.memory


def log_step(
    run: Training, metrics: Metrics | None, meter: "Meter", share: torch.Tensor, memory: tuple, rates: list[float]
) -> dict:
    """Record the figures of a step made at the learning rates `rates`; returns them on every rank."""
    dist.all_reduce(share)
    speed = meter.read()
    waited = torch.tensor(speed["data/wait_share"], device=run.process.device)
    dist.all_reduce(waited, dist.ReduceOp.MAX)  # the others wait for the rank that waits for its data
    speed["data/wait_share"] = waited.item()
    weights_rate, _, gates_rate = rates
    figures = {
        "train/loss": share.item(),
        "train/gradient_norm": float(run.engine.get_global_grad_norm()),
        "train/learning_rate": weights_rate,
        "train/gate_learning_rate": gates_rate,
        "train/tokens": run.state.tokens,
        "train/skipped_steps": run.engine.skipped_steps,
        **speed,
    }
    if metrics:
        metrics.record(run.state.step, figures | memory_metrics(run.model, memory))
        metrics.histogram(run.state.step, "gate", gates(run.model))
    return figures


def validation_is_due(run: Training) -> bool:
    """Also behind a resume, if the run was stopped before or in the validation of its checkpoint's step."""
    every, step = run.recipe.validation.every, run.state.step
    return every > 0 and run.state.validated != step and (step % every == 0 or step == run.recipe.steps)


def validate(run: Training, metrics: Metrics | None, progress: ProgressBar, stop: Stop) -> None:
    """Loss on the validation rows with and without the memory; left without a result if the run is to stop."""
    means = []
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
    if metrics:
        metrics.record(
            run.state.step,
            {
                "validation/loss": loss,
                "validation/loss_memory_off": without,
                "validation/gained_by_memory": without - loss,
            },
        )
    progress.say(f"step {run.state.step}: validation loss {loss:.4f}, with the memory switched off {without:.4f}")


@dataclass
class Meter:
    """Tokens per second of training alone, without validation and checkpoints."""

    run: Training
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        self.flops = training_flops_per_token(self.run.model.config)
        self.peak = peak_flops(self.run.process.device, self.run.precision) * self.run.shape.world_size
        self._since = time.perf_counter()
        self._readings, self._waited, self._said = 0, self.run.stream.waited, False

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def paused(self) -> "_Pause":
        return _Pause(self)

    def read(self) -> dict[str, float]:
        """Figures since the last reading."""
        if self.run.process.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds = self.seconds + now - self._since
        rate = self.tokens / seconds
        waited, self._waited = self.run.stream.waited - self._waited, self.run.stream.waited
        self.tokens, self.seconds, self._since = 0, 0.0, now
        self._readings += 1
        return {
            "speed/tokens_per_s": rate,
            "speed/mfu": rate * self.flops / self.peak,
            "speed/memory_gib": memory_in_use(self.run.process.device) / 2**30,
            "data/wait_share": waited / seconds,
        }

    def waits_for_data(self, share: float) -> bool:
        """Whether it is time to say so: once a run, and not at its first reading, when workers start."""
        if self._said or self._readings < 2 or share < WAITING:
            return False
        self._said = True
        return True


class _Pause:
    def __init__(self, meter: Meter):
        self.meter = meter

    def __enter__(self) -> None:
        self.meter.seconds += time.perf_counter() - self.meter._since

    def __exit__(self, *_) -> None:
        self.meter._since = time.perf_counter()


def announce(run: Training, progress: ProgressBar) -> None:
    """Say what is about to be trained, and on what."""
    config, shape = run.model.config, run.shape
    parameters = sum(p.numel() for p in run.model.parameters())
    progress.say(
        f"{run.recipe.name}: {parameters / 1e6:.1f}M parameters, {run.recipe.steps} steps of {shape.rows} rows of "
        f"{run.sequence_length} tokens in segments of {config.segment_length}, {config.segments_per_block or 'all'} at "
        f"once; {shape.world_size} ranks x "
        f"{shape.accumulation} micro-batches x {shape.micro_rows} rows, {run.precision} on {run.process.device.type}"
    )
    progress.say(f"each gate can move by {gate_reach(run.recipe):.1f} at most in all steps of this recipe")
    if run.resumed_from:
        progress.say(f"going on from {run.resumed_from}: {run.state.tokens:,} tokens seen")
