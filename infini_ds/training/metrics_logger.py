"""Logs training and validation metrics and throughput."""

import logging
import time
from contextlib import ExitStack

import torch

from infini_ds.metrics.memory_diagnostics import MemoryDiagnostics, gate_metrics
from infini_ds.metrics.metric_writers import MetricWriter, gates, memory_metrics
from infini_ds.planning.hardware import memory_in_use, peak_flops, training_flops_per_token
from infini_ds.training.hooks import Hook, Step
from infini_ds.training.stability import RollbackReason
from infini_ds.training.trainer import Trainer
from infini_ds.utils.progress import ProgressBar

DATA_WAIT_WARNING = 0.1  # share of the time spent waiting for data from which on a run warns


class MetricsLogger(Hook):
    """Records metrics every `log_every` steps and at each validation, and shows the progress; the first rank writes.

    What was recorded of steps later than the run's is removed, at the start and at a rollback.
    """

    writer: MetricWriter | None = None
    diagnostics: MemoryDiagnostics | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.meter = ThroughputMeter(trainer)
        self._open = ExitStack()
        bar = ProgressBar("training", trainer.recipe.steps, trainer.state.step, shown=trainer.is_first)
        self.progress = self._open.enter_context(bar)
        self._open_writer(trainer)

    def _open_writer(self, trainer: Trainer) -> None:
        if trainer.is_first:
            self.writer = MetricWriter(trainer.recipe.folder, trainer.state.step)
            self.diagnostics = MemoryDiagnostics(trainer.recipe)

    def on_step_start(self, trainer: Trainer, step: Step) -> None:
        self.meter.start()

    def after_step(self, trainer: Trainer, step: Step) -> None:
        self.meter.tokens += trainer.tokens_per_step
        events = {f"stability/{name}": value for name, value in step.events.items()}
        if events and self.writer:
            self.writer.record(step.number, events)
        if step.number % trainer.recipe.log_every == 0 or step.number == trainer.recipe.steps:
            figures = self._step_figures(trainer, step)
            speed = f"{figures['speed/tokens_per_s']:,.0f}"
            self.progress.advance({"loss": f"{step.loss:.4f}", "tokens/s": speed})
        else:
            self.progress.advance()
        self.meter.stop()

    def after_validation(self, trainer: Trainer, loss: float, loss_memory_off: float) -> None:
        trainer.log(f"validation loss {loss:.4f}, with the memory off {loss_memory_off:.4f}")
        figures = {"validation/loss": loss, "validation/loss_memory_off": loss_memory_off}
        self._record(trainer, figures | {"validation/gained_by_memory": loss_memory_off - loss})

    def on_rollback(self, trainer: Trainer, reason: RollbackReason) -> None:
        self.progress.rewind(trainer.state.step)
        if self.writer:
            self.writer.close()
        self._open_writer(trainer)
        self.meter.reset()

    def on_end(self, trainer: Trainer) -> None:
        self._open.close()
        if self.writer:
            self.writer.close()

    def _step_figures(self, trainer: Trainer, step: Step) -> dict[str, float]:
        """Record the figures of a step; returns them on every rank."""
        speed = self.meter.read(step)
        figures = {
            "train/loss": step.loss,
            "train/gradient_norm": trainer.engine.gradient_norm(),
            "train/learning_rate": step.learning_rates["decay"],
            "train/gate_learning_rate": step.learning_rates["gates"],
            "train/tokens": trainer.state.tokens,
            "train/skipped_steps": trainer.engine.skipped_steps,
            **speed,
        }
        if self.writer:
            assert step.memory is not None, "the forward pass comes first"
            gates_now = gates(trainer.model)
            self._record(trainer, figures | memory_metrics(trainer.model, step.memory) | gate_metrics(gates_now))
            self.writer.histogram(step.number, "gate", gates_now)
        if self.meter.warns_of_data_wait(speed["data/wait_share"]):
            trainer.log(
                f"{speed['data/wait_share']:.0%} of the time is spent waiting for data: raise "
                f"data.workers={trainer.recipe.data.workers}",
                logging.WARNING,
            )
        return figures

    def _record(self, trainer: Trainer, figures: dict[str, float]) -> None:
        if self.writer and self.diagnostics:
            self.writer.record(trainer.state.step, figures)
            for warning in self.diagnostics.warnings(trainer.state.step, figures):
                trainer.log(warning, logging.WARNING)


class ThroughputMeter:
    """Measures tokens per second within steps; the time between them, for validation and checkpoints, is left out."""

    def __init__(self, trainer: Trainer):
        run = trainer.run
        self.device = trainer.device
        self._flops_per_token = training_flops_per_token(trainer.model.config)
        self._peak_flops = peak_flops(self.device, run.precision) * run.dims.world_size
        self._world_size, self._warned = run.dims.world_size, False
        self.reset()

    def reset(self) -> None:
        self.tokens, self._seconds, self._started = 0, 0.0, time.perf_counter()
        self._seconds_waited = [0.0] * self._world_size
        self._readings = 0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._seconds += time.perf_counter() - self._started

    def read(self, step: Step) -> dict[str, float]:
        """Return the figures since the last reading, within a step. This waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds = self._seconds + now - self._started
        tokens_per_s = self.tokens / seconds
        assert step.exchange is not None
        waited = step.exchange.figures.seconds_waited
        # The other ranks wait for the one that waits longest for its data.
        longest = max(now - before for now, before in zip(waited, self._seconds_waited, strict=True))
        self.tokens, self._seconds, self._started, self._seconds_waited = 0, 0.0, now, waited
        self._readings += 1
        return {
            "speed/tokens_per_s": tokens_per_s,
            "speed/mfu": tokens_per_s * self._flops_per_token / self._peak_flops,
            "speed/memory_gib": memory_in_use(self.device) / 2**30,
            "data/wait_share": longest / seconds,
        }

    def warns_of_data_wait(self, share: float) -> bool:
        """Whether to warn now: once a run, and not at the first reading, when workers start."""
        if self._warned or self._readings < 2 or share < DATA_WAIT_WARNING:
            return False
        self._warned = True
        return True
