"""What a run records of its steps and validations, says of them, and how fast it is."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from infini_ds.metrics.memory_diagnostics import MemoryDiagnostics, gate_metrics
from infini_ds.metrics.metric_writers import MetricWriter, gates, memory_metrics
from infini_ds.planning.hardware import memory_in_use, peak_flops, training_flops_per_token
from infini_ds.training.setup import Training
from infini_ds.utils.progress import ProgressBar

WAITING = 0.1  # of the time, for data, from which on a run says so


class MetricsLogger:
    """`with MetricsLogger(run, progress) as recorder:` on every rank; the first one writes. What was recorded of later steps
    than the run stands at is written over.
    """

    def __init__(self, run: Training, progress: ProgressBar):
        self.run, self.progress = run, progress
        self.meter = Meter(run)
        self.metrics = self.health = None
        if run.process.is_first:
            self.metrics = MetricWriter(run.recipe.folder, run.state.step)
            self.health = MemoryDiagnostics(run.recipe)

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *_) -> None:
        if self.metrics:
            self.metrics.close()

    def count(self, tokens: int) -> None:
        self.meter.tokens += tokens

    def paused(self) -> "_Pause":
        """What is done inside is no part of the speed of training."""
        return _Pause(self.meter)

    def step(self, loss: float, memory: tuple, rates: list[float]) -> dict[str, float]:
        """Record the figures of a step made at the learning rates `rates`; returns them on every rank."""
        speed = self.meter.read()
        waited = torch.tensor(speed["data/wait_share"], device=self.run.process.device)
        dist.all_reduce(waited, dist.ReduceOp.MAX)  # the others wait for the rank that waits for its data
        speed["data/wait_share"] = waited.item()
        weights_rate, _, gates_rate = rates
        figures = {
            "train/loss": loss,
            "train/gradient_norm": float(self.run.engine.get_global_grad_norm()),
            "train/learning_rate": weights_rate,
            "train/gate_learning_rate": gates_rate,
            "train/tokens": self.run.state.tokens,
            "train/skipped_steps": self.run.engine.skipped_steps,
            **speed,
        }
        if self.metrics:
            of_gates = gates(self.run.model)
            self._record(figures | memory_metrics(self.run.model, memory) | gate_metrics(of_gates))
            self.metrics.histogram(self.run.state.step, "gate", of_gates)
        if self.meter.waits_for_data(speed["data/wait_share"]):
            self.say(
                f"{speed['data/wait_share']:.0%} of the time goes by waiting for data: raise "
                f"data.workers={self.run.recipe.data.workers}"
            )
        return figures

    def validation(self, loss: float, without: float) -> None:
        """Mean losses on the validation rows, with the memory and without it."""
        names = ("validation/loss", "validation/loss_memory_off", "validation/gained_by_memory")
        self.say(f"validation loss {loss:.4f}, with the memory switched off {without:.4f}")
        self._record(dict(zip(names, (loss, without, without - loss), strict=True)))

    def event(self, sentence: str, **values: float) -> None:
        """Something that happened at this step: said, and marked in the curves as `stability/NAME`."""
        self.say(sentence)
        if self.metrics:
            self.metrics.record(self.run.state.step, {f"stability/{name}": value for name, value in values.items()})

    def say(self, sentence: str) -> None:
        self.progress.say(f"step {self.run.state.step}: {sentence}")

    def _record(self, figures: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.record(self.run.state.step, figures)
            for hint in self.health.hints(self.run.state.step, figures):
                self.say(hint)


@dataclass
class Meter:
    """Tokens per second of training alone, without validation and checkpoints."""

    run: Training
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        self.flops = training_flops_per_token(self.run.model.config)
        self.peak = peak_flops(self.run.process.device, self.run.precision) * self.run.process.world_size
        self._since = time.perf_counter()
        self._readings, self._waited, self._said = 0, self.run.stream.waited, False

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
