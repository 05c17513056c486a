"""What the trainer calls at fixed points of a run: everything around a step that is not the step itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from infini_ds.data.batches import Batch
from infini_ds.distributed.async_gather import AsyncGather
from infini_ds.model.memory_rule import State

if TYPE_CHECKING:
    from infini_ds.training.recall import RecallAccuracy
    from infini_ds.training.stability import RollbackReason
    from infini_ds.training.trainer import Trainer


@dataclass(frozen=True)
class RankFigures:
    """What the ranks tell each other in a step."""

    losses: list[float]  # each rank's part of the step's mean loss
    next_predicted_tokens: int  # of the next global batch
    stop_signal: int  # that a rank has received; 0 for none
    seconds_waited: list[float]  # for data, by each rank, in all steps since the start or the last rollback


@dataclass
class Step:
    """One step of training, on one rank."""

    number: int  # from 1: the number of steps once it is done
    batch: Batch  # this rank's rows
    predicted_tokens: int  # of the global batch: that the loss is taken over; 0 if all of its rows are skipped
    tokens_per_part: Tensor  # predicted tokens / (micro-batches * data ranks), whose gradients are averaged
    learning_rates: dict[str, float]  # by parameter group
    memory: Sequence[State] = ()  # each layer's state after the last micro-batch
    exchange: AsyncGather | None = None  # started after the backward pass
    skip: bool = False  # leave the weights as they are; `Hook.before_step` may set it, on all ranks alike
    rollback: RollbackReason | None = None  # `Hook.after_step` may set it, on all ranks alike
    events: dict[str, float] = field(default_factory=dict)  # recorded by the metrics as `stability/NAME`

    @cached_property
    def figures(self) -> RankFigures:
        """Known after the backward pass. Before the optimizer step, reading them waits for the device."""
        assert self.exchange is not None, "the backward pass comes first"
        losses, tokens, signals, waited = map(list, zip(*self.exchange.read(), strict=True))
        return RankFigures(losses, int(sum(tokens)), int(max(signals)), waited)

    @property
    def loss(self) -> float:
        """Mean over the predicted tokens of the global batch; NaN if there are none."""
        return sum(self.figures.losses) if self.predicted_tokens else math.nan


class Hook:
    """Does nothing at any point. Override what is needed, and add an instance to the list in `setup.build_trainer`.

    Every rank calls every hook, in the order of the list, so a hook may call collective operations.
    """

    def on_start(self, trainer: Trainer) -> None:
        """When training starts, after the newest checkpoint is loaded and before the first validation."""

    def on_step_start(self, trainer: Trainer, step: Step) -> None:
        """Before the forward pass."""

    def before_step(self, trainer: Trainer, step: Step) -> None:
        """After the backward pass and before the optimizer step."""

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """After the optimizer step, which may have been skipped."""

    def after_validation(self, trainer: Trainer, loss: float, loss_memory_off: float, gain_error: float) -> None:
        """After a validation that has not been aborted. gain_error: standard error of loss_memory_off - loss."""

    def after_recall(self, trainer: Trainer, accuracies: Sequence[RecallAccuracy]) -> None:
        """After `after_validation`, if the recipe asks for recall: the accuracy on each of its tasks."""

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        """After the step's validation, if one is due. Not called for a step that leads to a rollback."""

    def on_stage(self, trainer: Trainer) -> None:
        """After a change of stage, which the next step is the first of. A rollback may change the stage without it."""

    def on_rollback(self, trainer: Trainer, reason: RollbackReason) -> None:
        """After `after_step` of a step that leads to a rollback."""

    def on_end(self, trainer: Trainer) -> None:
        """When training ends: at the last step, at a stop, or after an error."""
