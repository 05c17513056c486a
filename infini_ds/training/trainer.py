"""The training loop."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from infini_ds.checkpoint import manager as checkpoints
from infini_ds.checkpoint.manifest import TrainState
from infini_ds.config.recipe import Recipe
from infini_ds.config.resolve import ResolvedRun
from infini_ds.data.batches import Batch
from infini_ds.data.skip_rows import BatchStream, SkipRows
from infini_ds.data.streams import ValidationRows
from infini_ds.distributed.async_gather import AsyncGather
from infini_ds.distributed.signals import GracefulShutdown
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.training.curriculum import (
    describe_stage,
    reason_to_advance,
    recall_of_stage,
    recall_tasks,
    start_of_stage,
)
from infini_ds.training.hooks import Hook, Step
from infini_ds.training.recall import RecallAccuracy, RecallExamples, measure_recall
from infini_ds.training.validation import PositionLosses, gain_standard_error, position_losses

if TYPE_CHECKING:  # imports DeepSpeed, which takes seconds
    from infini_ds.training.engine import Engine

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Trains on one rank, in step with the others."""

    run: ResolvedRun  # at the stage of its next step
    engine: "Engine"  # model, optimizer and learning-rate schedule
    stream: BatchStream  # this rank's training batches
    validation: ValidationRows
    state: TrainState  # where the run stands
    shutdown: GracefulShutdown
    latest_checkpoint: Path | None  # of this run; None before the first one
    hooks: Sequence[Hook]  # called in this order
    recall_examples: Mapping[str, RecallExamples] = field(default_factory=dict)  # of each task that is measured
    data_state: dict[str, Any] = field(default_factory=dict)  # the stream's position after this step

    def fit(self) -> bool:
        """Train from where the run stands. Returns True at the last step, False after a requested stop."""
        self.shutdown.can_save = True
        self.call(Hook.on_start)
        try:
            self.start_from_state()
            while not self.is_complete and not self.shutdown.agreed:
                step = self.next_step()
                self.call(Hook.on_step_start, step)
                loss = self.forward_backward(step)
                self.exchange(step, loss)
                self.call(Hook.before_step, step)
                self.engine.step(step.skip)  # clip, optimizer, learning-rate schedule
                self.count(step)
                self.call(Hook.after_step, step)  # log
                if step.rollback:
                    self.call(Hook.on_rollback, step.rollback)
                    self.start_from_state()
                    continue
                self.validate_if_due()
                self.advance_if_due()
                self.call(Hook.on_step_end, step)  # save
        finally:
            self.call(Hook.on_end)
        if not self.is_complete:
            where = f"step {self.state.step} of {self.recipe.steps}"
            logger.info(f"stopped by {self.shutdown.reason} at {where}: resume with the same command")
        elif self.state.stage + 1 < len(self.run.stages):
            where = f"stage {self.state.stage + 1} of {len(self.run.stages)}"
            self.log(f"the run is complete in {where}: later stages need more steps=", logging.WARNING)
        return self.is_complete

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def model(self) -> InfiniGPTNeoForCausalLM:
        return self.engine.module

    @property
    def device(self) -> torch.device:
        return self.run.environment.device

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which logs and writes."""
        return self.run.dims.rank == 0

    @property
    def is_complete(self) -> bool:
        """Whether the run has reached its last step."""
        return self.state.step == self.recipe.steps

    @property
    def tokens_per_step(self) -> int:
        return self.run.batch_shape.rows * self.run.sequence_length

    def call(self, event: Callable[..., None], *arguments: object) -> None:
        """Call a method of `Hook` on all hooks."""
        for hook in self.hooks:
            getattr(hook, event.__name__)(self, *arguments)

    def log(self, sentence: str, level: int = logging.INFO) -> None:
        """Log a sentence about the current step, once; all ranks may call it."""
        if self.is_rank_zero:
            logger.log(level, f"step {self.state.step}: {sentence}")

    def start_from_state(self) -> None:
        """Read the first batch, and do what a stop has left out: this step's validation, and a change of stage."""
        self.read_first_batch()
        self.validate_if_due()
        self.advance_if_due()

    def read_first_batch(self) -> None:
        """Read the first batch of the stream; later ones are read while the step before is computed."""
        self._batches: Iterator[Batch] = iter(self.stream)
        self._batch = next(self._batches)
        self._waited_before = self.stream.waited
        tokens = torch.tensor(self._counted_tokens(), device=self.device)
        dist.all_reduce(tokens)  # later ones travel with the exchange of the step before
        self._predicted_tokens = int(tokens)

    def _counted_tokens(self) -> int:
        """Return the predicted tokens of the next batch, on the first of the ranks that share its rows; else 0."""
        return 0 if self.run.dims.sequence_rank else self._batch.predicted_tokens

    def next_step(self) -> Step:
        shape, tokens = self.run.batch_shape, self._predicted_tokens
        tokens_per_part = torch.tensor(tokens).clamp(min=1) / (shape.data_size * shape.accumulation)
        return Step(
            number=self.state.step + 1,
            batch=self._batch,
            predicted_tokens=tokens,
            tokens_per_part=tokens_per_part.to(self.device, non_blocking=True),
            learning_rates=self.engine.learning_rates(),
            skip=not tokens,
        )

    def forward_backward(self, step: Step) -> Tensor:
        """Compute the gradient of the step's loss; returns this rank's part of that loss, on the device.

        The loss is the mean over all predicted tokens of the global batch, whichever rank or micro-batch they are in.
        DeepSpeed averages gradients over ranks and micro-batches, so each part is divided by the mean number of tokens
        of a part. Ranks that share a row all have its loss, and the mean of their gradients is that of the row.
        """
        shape, parts = self.run.batch_shape, self.run.dims.world_size * self.run.batch_shape.accumulation
        loss = torch.zeros((), device=self.device)
        for micro_batch in step.batch.micro_batches(shape.micro_rows, self.device):
            output = self.engine(**micro_batch, num_items_in_batch=step.tokens_per_part)
            assert output.loss is not None and output.memory is not None
            self.engine.backward(output.loss)
            loss += output.loss.detach().float() / parts
            step.memory = output.memory
        return loss

    def exchange(self, step: Step, loss: Tensor) -> None:
        """Start the only exchange between the ranks in a step, besides DeepSpeed's own.

        How many tokens the global batch predicts has to be known before the forward pass. So each rank reads its next
        batch one step ahead, and its number of tokens travels with the loss of this step. Nothing here waits for the
        device. The one wait of a step is DeepSpeed's: the host has to see whether the gradient is finite before it lets
        the optimizer change the weights. Figures that are read after that are there already.
        """
        self.data_state = self.stream.state_dict()  # before the stream moves on
        next_tokens = 0
        if step.number < self.recipe.steps:
            self._batch = next(self._batches)
            next_tokens = self._counted_tokens()
        waited = self.stream.waited - self._waited_before
        known = torch.tensor([next_tokens, self.shutdown.received, waited], dtype=torch.float64)
        step.exchange = AsyncGather(torch.cat([loss.double()[None], known.to(self.device, non_blocking=True)]))

    def count(self, step: Step) -> None:
        """Count the step, and take over what the other ranks know."""
        self.state.step = step.number
        self.state.tokens += self.tokens_per_step
        self._predicted_tokens = step.figures.next_predicted_tokens
        self.shutdown.agreed = self.shutdown.agreed or step.figures.stop_signal

    def validate_if_due(self) -> None:
        """Measure the loss on the validation rows, and the recall that is asked for, with and without the memory.

        Aborted, without a result, when a stop is requested.
        """
        every, state = self.recipe.validation.interval(self.recipe.steps), self.state
        is_due = every > 0 and state.validated != state.step and (state.step % every == 0 or self.is_complete)
        if not is_due or self.shutdown.agreed:
            return

        def abort() -> bool:
            return self.shutdown.agree(self.device)

        measured: list[PositionLosses] = []
        for use_memory in (True, False):
            losses = position_losses(
                self.model,
                self.validation,
                self.recipe.validation.rows,
                self.run.stages[-1].batch_shape.micro_rows,  # the rows are those of the last stage
                use_memory,
                abort=abort,
            )
            if losses is None:
                return
            measured.append(losses)
        recall: list[RecallAccuracy] = []
        for task in recall_tasks(self.run, state.stage):
            accuracy = measure_recall(self.model, self.recall_examples[task], abort)
            if accuracy is None:
                return
            recall.append(accuracy)
        on, off = measured
        state.validated, state.validation_loss = state.step, on.mean
        state.recall = recall_of_stage(self.run, state.stage, recall)
        error = gain_standard_error(on, off, self.model.config.segment_length)
        self.call(Hook.after_validation, on.mean, off.mean, error)
        if recall:
            self.call(Hook.after_recall, recall)

    def advance_if_due(self) -> None:
        """Change to the next stage of the curriculum if this one is over; the batch that was read ahead is dropped.

        After a requested stop nothing is decided: the resumed run does it, after the validation that was left out.
        """
        state, reason = self.state, reason_to_advance(self.run, self.state)
        if reason is None or self.is_complete or self.shutdown.agreed:
            return
        state.stage, state.stage_start = state.stage + 1, state.step
        state.losses = 0  # those of other data tell nothing about spikes
        self.follow_stage()
        self.data_state = start_of_stage(state.stage)
        self.stream = self.stream.at(self.data_state)
        self.read_first_batch()
        where = f"stage {state.stage + 1} of {len(self.run.stages)}"
        self.log(f"{where}: {reason}: {describe_stage(self.run, state.stage)}")
        self.call(Hook.on_stage)

    def follow_stage(self) -> None:
        """Take over the batch of the stage that the run's state names."""
        if self.run.stage != self.state.stage:
            self.run = self.run.at_stage(self.state.stage)
            self.engine.set_batch(self.run.deepspeed)

    def restore(self, checkpoint: Path, rows_to_skip: Collection[int]) -> None:
        """Load a checkpoint of this run, and skip rows from then on."""
        self.state, data_state = checkpoints.load(self.engine, checkpoint, self.run.dims)
        self.follow_stage()
        self.stream = SkipRows(self.stream.at(data_state), rows_to_skip)
        self.latest_checkpoint = checkpoint
