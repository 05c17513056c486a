"""What the trainer calls at fixed points of a run: everything around a step that is not the step itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from infini_ds.data.batches import Batch
from infini_ds.training.exchange import Exchange

if TYPE_CHECKING:
    from infini_ds.training.stability import RollbackReason
    from infini_ds.training.trainer import Trainer


@dataclass
class Step:
    """One step of training, on one rank.

    Attributes:
        number: from 1; the run's step count once it is done.
        batch: this rank's rows.
        predicted_tokens: tokens of the global batch that the loss is taken over; 0 if all of its rows are skipped.
        tokens_per_part: predicted tokens for each of the parts, micro-batches times data ranks, that are averaged.
        learning_rates: by parameter group.
        memory: each layer's memory at the end of the last micro-batch's rows; None before the forward pass.
        exchange: what the ranks have exchanged; None before the backward pass.
        skip: whether the optimizer leaves the weights as they are. `Hook.before_step` may set it, on all ranks alike.
        rollback: why the run has to go back to a checkpoint. `Hook.after_step` may set it, on all ranks alike.
        events: figures that the metrics record at this step as `stability/NAME`.
    """

    number: int
    batch: Batch
    predicted_tokens: int
    tokens_per_part: Tensor
    learning_rates: dict[str, float]
    memory: tuple | None = None
    exchange: Exchange | None = None
    skip: bool = False
    rollback: RollbackReason | None = None
    events: dict[str, float] = field(default_factory=dict)

    @property
    def rank_losses(self) -> list[float]:
        """Each rank's part of the loss. Waits for the device if it is read before the optimizer step."""
        assert self.exchange is not None, "the backward pass comes first"
        return self.exchange.figures.losses

    @property
    def loss(self) -> float:
        """Mean over the predicted tokens of the global batch; NaN if there are none."""
        return sum(self.rank_losses) if self.predicted_tokens else math.nan


class Hook:
    """Does nothing at any point: override what is needed, and add an instance in `setup.build_trainer`.

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

    def after_validation(self, trainer: Trainer, loss: float, loss_memory_off: float) -> None:
        """After a validation that has not been aborted."""

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        """After the step's validation, if one is due. Not called for a step that leads to a rollback."""

    def on_rollback(self, trainer: Trainer, reason: RollbackReason) -> None:
        """After `after_step` of a step that leads to a rollback."""

    def on_end(self, trainer: Trainer) -> None:
        """When training ends: at the last step, at a stop, or after an error."""
