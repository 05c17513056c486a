"""The training loop."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
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
from infini_ds.distributed.signals import GracefulShutdown
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.training.exchange import Exchange
from infini_ds.training.hooks import Hook, Step
from infini_ds.training.validation import position_losses

if TYPE_CHECKING:  # imports DeepSpeed, which takes seconds
    from infini_ds.training.engine import Engine

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Trains on one rank, in step with the others.

    Attributes:
        run: the resolved recipe.
        engine: holds model, optimizer and learning-rate schedule.
        stream: this rank's training batches.
        validation: the validation rows.
        state: where the run stands.
        shutdown: whether a stop is requested.
        latest_checkpoint: the newest checkpoint of the run, None before the first one.
        hooks: called in this order.
        data_state: position of the stream after the current step, for its checkpoint.
    """

    run: ResolvedRun
    engine: "Engine"
    stream: BatchStream
    validation: ValidationRows
    state: TrainState
    shutdown: GracefulShutdown
    latest_checkpoint: Path | None
    hooks: Sequence[Hook]
    data_state: dict[str, Any] = field(default_factory=dict)

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
                self.call(Hook.on_step_end, step)  # save
        finally:
            self.call(Hook.on_end)
        if not self.is_complete:
            where = f"step {self.state.step} of {self.recipe.steps}"
            logger.info(f"stopped by {self.shutdown.reason} at {where}: resume with the same command")
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
    def is_first(self) -> bool:
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
        if self.is_first:
            logger.log(level, f"step {self.state.step}: {sentence}")

    def start_from_state(self) -> None:
        """Read the first batch, and validate if the run was stopped before or in the validation of this step."""
        self._batches: Iterator[Batch] = iter(self.stream)
        self._batch = next(self._batches)
        self._waited_before = self.stream.waited
        tokens = torch.tensor(self._batch.predicted_tokens, device=self.device)
        dist.all_reduce(tokens)  # later ones travel with the exchange of the step before
        self._predicted_tokens = int(tokens)
        self.validate_if_due()

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
        DeepSpeed averages gradients over data ranks and micro-batches, so each part is divided by the mean number of
        tokens of a part.
        """
        shape = self.run.batch_shape
        loss = torch.zeros((), device=self.device)
        for micro_batch in step.batch.micro_batches(shape.micro_rows, self.device):
            output = self.engine(**micro_batch, num_items_in_batch=step.tokens_per_part)
            self.engine.backward(output.loss)
            loss += output.loss.detach().float() / (shape.data_size * shape.accumulation)
            step.memory = output.memory
        return loss

    def exchange(self, step: Step, loss: Tensor) -> None:
        """Read the next batch, and exchange with the other ranks what each of them knows."""
        self.data_state = self.stream.state_dict()  # before the stream moves on
        next_tokens = 0
        if step.number < self.recipe.steps:
            self._batch = next(self._batches)
            next_tokens = self._batch.predicted_tokens
        step.exchange = Exchange(loss, next_tokens, self.shutdown.received, self.stream.waited - self._waited_before)

    def count(self, step: Step) -> None:
        """Count the step, and take over what the other ranks know."""
        self.state.step = step.number
        self.state.tokens += self.tokens_per_step
        assert step.exchange is not None
        self._predicted_tokens = step.exchange.figures.next_predicted_tokens
        self.shutdown.agreed = self.shutdown.agreed or step.exchange.figures.stop_signal

    def validate_if_due(self) -> None:
        """Measure the loss on the validation rows with and without the memory.

        Aborted, without a result, when a stop is requested.
        """
        every, state = self.recipe.validation.every, self.state
        is_due = every > 0 and state.validated != state.step and (state.step % every == 0 or self.is_complete)
        if not is_due or self.shutdown.agreed:
            return
        means = []
        for use_memory in (True, False):
            losses = position_losses(
                self.model,
                self.validation,
                self.recipe.validation.rows,
                self.run.batch_shape.micro_rows,
                use_memory,
                abort=lambda: self.shutdown.agree(self.device),
            )
            if losses is None:
                return
            means.append(losses.mean)
        state.validated, state.validation_loss = state.step, means[0]
        self.call(Hook.after_validation, *means)

    def restore(self, checkpoint: Path, rows_to_skip: Collection[int]) -> None:
        """Load a checkpoint of this run, and skip rows from then on."""
        self.state, data_state = checkpoints.load(self.engine, checkpoint, self.run.dims)
        self.stream = SkipRows(self.stream.at(data_state), rows_to_skip)
        self.latest_checkpoint = checkpoint
