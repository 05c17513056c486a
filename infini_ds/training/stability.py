"""Training stability: non-finite losses and gradients, loss spikes, rollback.

All ranks decide alike. A non-finite loss on one rank makes its gradient NaN (`Engine.backward`), and a non-finite
gradient shows in its norm, which DeepSpeed sums over the ranks before the optimizer steps: the step is skipped, and
what it was is recorded after it. Too many skipped steps in a row, or a loss spike if the recipe says so, lead to a
rollback to the last good checkpoint; the rows of the steps that failed are skipped from then on.
"""

import logging
import math
from collections import deque
from dataclasses import dataclass

import torch.distributed as dist

from infini_ds.checkpoint import manager as checkpoints
from infini_ds.checkpoint import skip_records
from infini_ds.checkpoint.manifest import TrainState, complete_checkpoints, read_manifest
from infini_ds.checkpoint.skip_records import SKIPPED_ROWS, SKIPPED_STEPS, Rollback, SkippedStep
from infini_ds.config.recipe import Recipe
from infini_ds.distributed.collectives import all_gather_object, broadcast_from_rank_zero
from infini_ds.training.hooks import Hook, Step
from infini_ds.training.trainer import Trainer
from infini_ds.utils.errors import UserError

logger = logging.getLogger(__name__)
MIN_DEVIATION = 1e-6  # of the loss, so that a constant loss does not divide by zero


@dataclass(frozen=True)
class StepDecision:
    """What a step's loss shows; the same on every rank."""

    loss: float  # of the step, over all ranks
    nonfinite_ranks: list[int]  # whose part of the loss is NaN or infinite
    sigmas: float  # standard deviations that the loss lies above the recent mean; 0 if spikes are not looked for
    spike: bool
    rolls_back: bool  # because of the spike


@dataclass(frozen=True)
class RollbackReason:
    """Why the run has to go back to a checkpoint."""

    what: str
    spike: bool  # or steps that were skipped


class Stability(Hook):
    """Decides which steps are skipped, records them, and rolls the run back."""

    def __init__(self, recipe: Recipe):
        """Read the run's earlier rollbacks, on all ranks together."""
        self.recipe, self.limits = recipe, recipe.stability
        self._rollbacks = broadcast_from_rank_zero(lambda: skip_records.read_rollbacks(recipe.folder))
        self._recent: deque[tuple[int, list[int]]] = deque(maxlen=self.limits.spike_batches)  # step, this rank's rows

    @property
    def rows_to_skip(self) -> frozenset[int]:
        return frozenset(row for rollback in self._rollbacks for row in rollback.rows)

    def before_step(self, trainer: Trainer, step: Step) -> None:
        self._recent.append((step.number, step.batch.row_numbers))
        # Only here does the host read the loss before the optimizer steps: a step that leads to a rollback is not made.
        if self.limits.on_spike == "roll_back" and self._looks_for_spikes(trainer.state):
            step.skip = step.skip or self.decide(trainer, step).rolls_back

    def after_step(self, trainer: Trainer, step: Step) -> None:
        decision = self.decide(trainer, step)
        step.rollback = self.record(trainer, step, decision)

    def on_rollback(self, trainer: Trainer, reason: RollbackReason) -> None:
        self.roll_back(trainer, reason)

    def decide(self, trainer: Trainer, step: Step) -> StepDecision:
        """Compare the step's loss with the recent ones."""
        state, loss, sigmas = trainer.state, step.loss, 0.0
        if self._looks_for_spikes(state) and math.isfinite(loss):
            sigmas = (loss - state.loss_mean) / max(math.sqrt(state.loss_variance), MIN_DEVIATION)
        spike = sigmas > self.limits.spike_sigmas > 0
        rolls_back = spike and self.limits.on_spike == "roll_back" and trainer.latest_checkpoint is not None
        nonfinite = [rank for rank, part in enumerate(step.figures.losses) if not math.isfinite(part)]
        return StepDecision(loss, nonfinite, sigmas, spike, rolls_back)

    def _looks_for_spikes(self, state: TrainState) -> bool:
        return self.limits.spike_sigmas > 0 and state.losses >= self.limits.spike_window

    def record(self, trainer: Trainer, step: Step, decision: StepDecision) -> RollbackReason | None:
        """Count a step that was just made or skipped, and log and write down a skipped one.

        Returns the reason for a rollback, if there is one.
        """
        state = trainer.state
        if not step.predicted_tokens:
            trainer.log("all of its rows are skipped")
            return None
        if decision.spike:
            step.events["loss_spike"] = decision.sigmas
            trainer.log(
                f"the loss is {decision.loss:.4f}, {decision.sigmas:.1f} standard deviations above the recent mean of "
                f"{state.loss_mean:.4f}",
                logging.WARNING,
            )
        if trainer.engine.step_was_applied:
            state.consecutive_skips = 0
            update_loss_statistics(state, decision.loss, self.limits.spike_window)
            return None
        reason = "spike" if decision.rolls_back else "loss" if decision.nonfinite_ranks else "gradient"
        rows = all_gather_object(step.batch.row_numbers)[:: trainer.run.dims.sequence]  # of each data rank
        if trainer.is_rank_zero:
            skipped = SkippedStep(step.number, reason, decision.nonfinite_ranks, rows)
            skip_records.append_skipped_step(self.recipe.folder, skipped)
        if decision.rolls_back:
            return RollbackReason(f"the loss spiked at step {step.number}", spike=True)
        state.consecutive_skips = n = state.consecutive_skips + 1
        step.events["consecutive_skips"] = n
        where = f" on rank {', '.join(map(str, decision.nonfinite_ranks))}" if decision.nonfinite_ranks else ""
        trainer.log(
            f"the {reason} is non-finite{where}, so the step is skipped ({SKIPPED_STEPS} has its rows)", logging.WARNING
        )
        if n < self.limits.max_consecutive_skips:
            return None
        return RollbackReason(f"the last {n} steps up to {step.number} had no finite loss or gradient", spike=False)

    def roll_back(self, trainer: Trainer, reason: RollbackReason) -> None:
        """Restore the last good checkpoint, from before any of the failed steps, and skip their rows from now on.

        The rows are on the disk before training continues, and no later checkpoint is: a run that is killed at any
        instant of this does the same when it is started again.

        Raises:
            UserError: no such checkpoint exists, or the run was rolled back to it too often.
        """
        folder = self.recipe.folder
        remedy = f"lower {self.recipe.optimizer.rates_of_weights}, in a run of another name="
        target = checkpoints.newest_intact(folder, healthy=True)
        if target is None:
            raise UserError(f"{reason.what}, and no checkpoint from before exists to roll back to: {remedy}")
        to_step = broadcast_from_rank_zero(lambda: read_manifest(target).state.step)
        times = sum(rollback.to_step == to_step for rollback in self._rollbacks)
        if times >= self.limits.max_rollbacks:
            raise UserError(
                f"{reason.what}, after {times} rollbacks to step {to_step} (stability.max_rollbacks="
                f"{self.limits.max_rollbacks}) and without the rows in {folder / SKIPPED_ROWS}: {remedy}"
            )
        rows = self._rows_of(reason, trainer.state, after=to_step)
        rollback = Rollback(trainer.state.step, to_step, reason.what, rows)
        if trainer.is_rank_zero:
            complete = complete_checkpoints(folder)
            for later in complete[complete.index(target) + 1 :]:
                checkpoints.remove(later)
            skip_records.append_rollback(folder, rollback)
        dist.barrier()
        self._rollbacks.append(rollback)
        self._recent.clear()
        trainer.restore(target, self.rows_to_skip)
        if trainer.is_rank_zero:
            logger.warning(
                f"{reason.what}: rolled back from step {rollback.from_step} to {to_step}, skipping {len(rows)} rows "
                f"from now on ({SKIPPED_ROWS})"
            )

    def _rows_of(self, reason: RollbackReason, state: TrainState, after: int) -> list[int]:
        """Return the rows of the skipped steps; for a spike, those of the last batches after the step `after`."""
        if reason.spike:
            of_ranks = all_gather_object([row for step, rows in self._recent if step > after for row in rows])
        else:  # from the disk, since the run may have been stopped and resumed in between
            records = broadcast_from_rank_zero(lambda: skip_records.read_skipped_steps(self.recipe.folder))
            rows_of_step = {record.step: record.rows for record in records if record.reason != "spike"}
            steps = sorted(step for step in rows_of_step if step <= state.step)[-state.consecutive_skips :]
            of_ranks = [rows for step in steps for rows in rows_of_step[step]]
        return sorted({row for rows in of_ranks for row in rows})


def update_loss_statistics(state: TrainState, loss: float, window: int) -> None:
    """Add a loss to the recent mean and variance; from `window` losses on it has a weight of 1/window."""
    state.losses += 1
    weight = 1 / min(state.losses, window)
    distance = loss - state.loss_mean
    state.loss_mean += weight * distance
    state.loss_variance = (1 - weight) * (state.loss_variance + weight * distance**2)
