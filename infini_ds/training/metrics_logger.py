"""Logs training and validation metrics and throughput."""

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack

from infini_ds.metrics.memory_diagnostics import MemoryDiagnostics, gate_metrics
from infini_ds.metrics.metric_writers import MetricWriter, gates, memory_metrics
from infini_ds.metrics.throughput import ThroughputMeter
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.planning.hardware import memory_in_use, peak_flops
from infini_ds.training.hooks import Hook, Step
from infini_ds.training.recall import RecallAccuracy
from infini_ds.training.stability import RollbackReason
from infini_ds.training.trainer import Trainer
from infini_ds.utils.progress import ProgressBar


class MetricsLogger(Hook):
    """Records metrics every `log_every` steps and at each validation, and shows the progress; the first rank writes.

    What was recorded of steps later than the run's is removed, at the start and at a rollback.
    """

    writer: MetricWriter | None = None
    diagnostics: MemoryDiagnostics | None = None

    def on_start(self, trainer: Trainer) -> None:
        run, flops_per_token = trainer.run, training_flops_per_token(trainer.run.model_config)
        peak = peak_flops(trainer.device, run.precision) * run.dims.world_size
        self.meter = ThroughputMeter(flops_per_token, peak, run.dims.world_size)
        self._open = ExitStack()
        bar = ProgressBar("training", trainer.recipe.steps, trainer.state.step, shown=trainer.is_rank_zero)
        self.progress = self._open.enter_context(bar)
        self._open_writer(trainer)

    def _open_writer(self, trainer: Trainer) -> None:
        if trainer.is_rank_zero:
            self.writer = MetricWriter(trainer.recipe.folder, trainer.state.step)
            self.diagnostics = MemoryDiagnostics(trainer.recipe)

    def on_step_start(self, trainer: Trainer, step: Step) -> None:
        self.meter.start()

    def after_step(self, trainer: Trainer, step: Step) -> None:
        self.meter.count(trainer.tokens_per_step)
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

    def after_validation(self, trainer: Trainer, loss: float, loss_memory_off: float, gain_error: float) -> None:
        trainer.log(f"validation loss {loss:.4f}, with the memory off {loss_memory_off:.4f}")
        figures = {"validation/loss": loss, "validation/loss_memory_off": loss_memory_off}
        gain = {"validation/gained_by_memory": loss_memory_off - loss, "validation/gain_standard_error": gain_error}
        self._record(trainer, figures | gain)

    def after_recall(self, trainer: Trainer, accuracies: Sequence[RecallAccuracy]) -> None:
        figures: dict[str, float] = {}
        for found in accuracies:
            trainer.log(f"recall {found.on:.3f}, with the memory off {found.off:.3f} ({found.task})")
            tag = re.sub(r"[^\w.-]", "_", found.task)  # TensorBoard takes no other characters
            figures |= {f"validation/recall/{tag}": found.on, f"validation/recall_memory_off/{tag}": found.off}
        self._record(trainer, figures)

    def on_stage(self, trainer: Trainer) -> None:
        self.meter.reset()

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
        speed = self.meter.read(step.figures.seconds_waited)
        figures = {
            "train/loss": step.loss,
            "train/gradient_norm": trainer.engine.gradient_norm(),
            "train/learning_rate": step.learning_rates["decay"],
            "train/gate_learning_rate": step.learning_rates["gates"],
            "train/tokens": trainer.state.tokens,
            "train/skipped_steps": trainer.engine.skipped_steps,
            "speed/memory_gib": memory_in_use(trainer.device) / 2**30,
            **speed,
        }
        if len(trainer.run.stages) > 1:
            figures["train/stage"] = trainer.state.stage + 1
        if "muon" in step.learning_rates:
            figures["train/muon_learning_rate"] = step.learning_rates["muon"]
        if self.writer:
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
