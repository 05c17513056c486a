"""What watches over the steps: a loss or gradient that is not finite, a spike of the loss, and the way back.

Behind the last backward pass of a step, and before the optimizer, the ranks tell each other their part of the loss, and
whether they were told to stop: one exchange of three numbers. So all of them decide the same. A gradient that is not
finite shows in its norm, which DeepSpeed sums up over the ranks before it steps.
"""

import json
import math
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from infini_ds.checkpoint import manager as checkpoints
from infini_ds.checkpoint.manifest import TrainState, complete_checkpoints, fsync_dir, read_manifest
from infini_ds.data.batches import Batch
from infini_ds.distributed.signals import GracefulShutdown
from infini_ds.training.metrics_logger import MetricsLogger
from infini_ds.training.setup import Training
from infini_ds.utils.errors import UserError

SKIPPED = "skipped.jsonl"  # each step that was skipped: why, on which ranks, and its row numbers
PASSED_OVER = "passed_over.jsonl"  # each time that the run went back, and the rows that it passes over since


@dataclass(frozen=True)
class StepDecision:
    """On a step before the optimizer makes it; the same on every rank."""

    loss: float  # of the whole step
    ranks: list[int]  # on which it is not finite
    sigmas: float  # that it lies above the recent mean; 0 if that is not looked at
    empty: bool  # all rows of the batch are passed over
    spike: bool
    goes_back: bool  # for the spike

    @property
    def skip(self) -> bool:
        return bool(self.ranks) or self.empty or self.goes_back


@dataclass(frozen=True)
class RollbackReason:
    """Why the run has to go back."""

    what: str
    spike: bool


class Stability:
    """Of one run, on every rank alike."""

    def __init__(self, run: Training):
        self.run, self.recipe, self._folder = run, run.recipe.stability, run.recipe.folder
        self.checkpoint_stands = run.resumed_from is not None
        self.checks_gradients = self.recipe.check_gradients  # of the first step that is made
        self._went_back = _of_first_rank(lambda: _read_lines(self._folder / PASSED_OVER))
        self._recent = deque(maxlen=self.recipe.spike_batches)  # steps, and this rank's row numbers

    @property
    def rows_to_skip(self) -> frozenset[int]:
        return frozenset(row for line in self._went_back for row in line["rows"])

    def record_rows(self, batch: Batch) -> None:
        """Keep the row numbers of the batch of the next step, for a rollback to skip."""
        self._recent.append((self.run.state.step + 1, batch.row_numbers))

    def judge(self, share: Tensor, predicted: Tensor, stop: GracefulShutdown) -> StepDecision:
        """Let all ranks know of each other what they have to know before the optimizer steps.

        Args:
            share: this rank's part of the mean loss. predicted: tokens of the whole batch that the loss is taken over.
        """
        mine = torch.stack([share.double(), predicted.double(), predicted.new_tensor(stop.received).double()])
        table = [torch.empty_like(mine) for _ in range(self.run.process.world_size)]
        dist.all_gather(table, mine)
        shares, (tokens, *_), told = torch.stack(table).t().tolist()
        stop.agreed = stop.agreed or int(max(told))
        loss, state = sum(shares) if tokens else math.nan, self.run.state
        sigmas = 0.0
        if self.recipe.spike_sigmas and state.losses >= self.recipe.spike_window and math.isfinite(loss):
            sigmas = (loss - state.loss_mean) / max(math.sqrt(state.loss_variance), 1e-6)
        spike = sigmas > self.recipe.spike_sigmas > 0
        goes_back = spike and self.recipe.on_spike == "roll_back" and self.checkpoint_stands
        ranks = [rank for rank, part in enumerate(shares) if not math.isfinite(part)]
        return StepDecision(loss, ranks, sigmas, not tokens, spike, goes_back)

    def note(self, verdict: StepDecision, recorder: MetricsLogger) -> RollbackReason | None:
        """Count the step that was just made or skipped, and write a skipped one down; returns why the run has to go
        back, if it has to.
        """
        run, state = self.run, self.run.state
        if verdict.empty:
            recorder.say("all of its rows are passed over")
            return None
        if verdict.spike:
            recorder.event(
                f"the loss is {verdict.loss:.4f}, {verdict.sigmas:.1f} standard deviations above the recent mean of "
                f"{state.loss_mean:.4f}",
                loss_spike=verdict.sigmas,
            )
        if run.engine.was_step_applied():
            state.consecutive_skips = 0
            _follow(state, verdict.loss, self.recipe.spike_window)
            return None
        reason = "spike" if verdict.goes_back else "loss" if verdict.ranks else "gradient"
        rows = _of_all_ranks(self._recent[-1][1])
        if run.process.is_first:
            line = {"step": state.step, "reason": reason, "ranks": verdict.ranks, "rows": rows}
            _add_line(self._folder / SKIPPED, line)
        if verdict.goes_back:
            return RollbackReason(f"the loss spiked at step {state.step}", spike=True)
        state.consecutive_skips = n = state.consecutive_skips + 1
        where = f" on rank {', '.join(map(str, verdict.ranks))}" if verdict.ranks else ""
        recorder.event(
            f"the {reason} was not finite{where}, the step was skipped ({SKIPPED} has its rows)", consecutive_skips=n
        )
        if n < self.recipe.max_consecutive_skips:
            return None
        return RollbackReason(f"the last {n} steps up to {state.step} had no finite loss or gradient", spike=False)

    def go_back(self, trouble: RollbackReason) -> str:
        """Put the run back to its last good checkpoint, whose step came before any of those in trouble, and pass over
        their rows from now on; returns what is to be said of it.

        The rows are on the disk before the run goes on, and no later checkpoint is: a run that is killed at any instant
        of this does the same when it is started again.

        Raises:
            UserError: there is no such checkpoint, or the run has gone back to it too often.
        """
        run, folder = self.run, self._folder
        remedy = f"lower optimizer.learning_rate={run.recipe.optimizer.learning_rate}, in a run of another name="
        target = checkpoints.newest_intact(folder, healthy=True)
        if target is None:
            raise UserError(f"{trouble.what}, and there is no checkpoint from before to go back to: {remedy}")
        step = _of_first_rank(lambda: read_manifest(target).state.step)
        times = sum(line["back_to"] == step for line in self._went_back)
        if times >= self.recipe.max_rollbacks:
            raise UserError(
                f"{trouble.what}, after going back to step {step} {times} times (stability.max_rollbacks="
                f"{self.recipe.max_rollbacks}) and passing over the rows in {folder / PASSED_OVER}: {remedy}"
            )
        rows, failed_at = self._rows_of(trouble, behind=step), run.state.step
        line = {"from": failed_at, "back_to": step, "why": trouble.what, "rows": rows}
        if run.process.is_first:
            good = complete_checkpoints(folder)
            for later in good[good.index(target) + 1 :]:
                checkpoints.remove(later)
            _add_line(folder / PASSED_OVER, line)
        dist.barrier()
        self._went_back.append(line)
        self._recent.clear()
        run.state, data_state = checkpoints.load(run.engine, target)
        run.stream = run.stream.at(data_state)
        run.resumed_from = target
        return (
            f"{trouble.what}: the run goes back from step {failed_at} to {step} and passes over {len(rows)} rows "
            f"({PASSED_OVER})"
        )

    def _rows_of(self, trouble: RollbackReason, behind: int) -> list[int]:
        """The rows of the steps in trouble; those of a spike as far as they come behind the step `behind`."""
        if trouble.spike:
            of_ranks = _of_all_ranks([row for step, rows in self._recent if step > behind for row in rows])
        else:  # from the disk, since the run may have been stopped and started again in between
            state, lines = self.run.state, _of_first_rank(lambda: _read_lines(self._folder / SKIPPED))
            skipped = {line["step"]: line["rows"] for line in lines if line["reason"] != "spike"}
            steps = sorted(step for step in skipped if step <= state.step)[-state.consecutive_skips :]
            of_ranks = [rows for step in steps for rows in skipped[step]]
        return sorted({row for rows in of_ranks for row in rows})


def _follow(state: TrainState, loss: float, window: int) -> None:
    """Let the recent mean and variance of the loss take in one more, from `window` on with a weight of 1/window."""
    state.losses += 1
    weight = 1 / min(state.losses, window)
    distance = loss - state.loss_mean
    state.loss_mean += weight * distance
    state.loss_variance = (1 - weight) * (state.loss_variance + weight * distance**2)


def _of_all_ranks(mine: list[int]) -> list[list[int]]:
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def _of_first_rank(read):
    """What the first rank reads; a shared file system may show the others something older."""
    found = [read() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def _read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _add_line(file: Path, line: dict) -> None:
    """All or nothing, and on the disk when it returns."""
    before = file.read_text() if file.exists() else ""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w") as opened:
        opened.write(before + json.dumps(line) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(partial, file)
    fsync_dir(file.parent)
