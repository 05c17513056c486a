"""The stages of a curriculum during training: when the next one begins, and the rows of each.

A change of stage is decided after the validation of a step, and takes effect with the next step. What decides it is in
`TrainState`, so a resumed run changes its stages at the same steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from infini_ds.checkpoint.manifest import TrainState
from infini_ds.config.resolve import ResolvedRun
from infini_ds.data.batches import Batch
from infini_ds.data.streams import TrainingStream
from infini_ds.streaming_compat.stale_memory import one_start_at_a_time
from infini_ds.training.recall import RecallAccuracy

STAGE = "stage"  # in the position of a stream: its stage


def recall_tasks(run: ResolvedRun, stage: int) -> list[str]:
    """Return the recall tasks that validations measure in a stage: those of validation.recall, and its own."""
    return list(dict.fromkeys([*run.recipe.validation.recall_tasks, *run.stages[stage].end.recall_tasks]))


def all_recall_tasks(run: ResolvedRun) -> list[str]:
    """Return the recall tasks that are measured in some stage."""
    return list(dict.fromkeys(task for stage in range(len(run.stages)) for task in recall_tasks(run, stage)))


def recall_of_stage(run: ResolvedRun, stage: int, accuracies: list[RecallAccuracy]) -> float | None:
    """Return the accuracy that the end of a stage depends on, with the memory on; None if nothing was measured."""
    tasks = run.stages[stage].end.recall_tasks
    found = [accuracy.on for accuracy in accuracies if accuracy.task in tasks]
    return fmean(found) if found else None


def reason_to_advance(run: ResolvedRun, state: TrainState) -> str | None:
    """Return why the next stage begins with the next step, or None. A stage has at least one step."""
    end, steps = run.stages[state.stage].end, state.step - state.stage_start
    if state.stage + 1 == len(run.stages) or steps == 0:
        return None
    measured = state.recall if state.validated == state.step else None
    if end.until is not None and measured is not None and measured >= end.until:
        return f"recall {measured:.3f} reached {end.until:g}"
    if end.steps is not None and steps >= end.steps:
        return f"stage {state.stage + 1} has run its {steps} steps"
    return None


def describe_stage(run: ResolvedRun, stage: int) -> str:
    """Return a stage's number, data and rows."""
    part = run.stages[stage]
    path = run.recipe.data.curriculum[stage].path
    return f"{path}, {part.batch_shape.rows} rows of {part.sequence_length} tokens a step"


def start_of_stage(stage: int) -> dict[str, Any]:
    """Return the position of the first batch of a stage."""
    return {STAGE: stage}


def open_stream(run: ResolvedRun) -> "TrainingStream | StageStream":
    """Return the training rows of the run's stage, from the first one on. Collective."""
    stream = TrainingStream(
        list(run.sources),
        run.batch_shape.rank_rows,
        run.recipe.data.seed,
        run.recipe.data.workers,
        run.cache_limit,
        data_rank=run.dims.data_rank,
        data_size=run.dims.data_size,
        first_row=run.stages[run.stage].first_row,
    )
    return stream if len(run.stages) == 1 else StageStream(run, stream)


@dataclass(frozen=True)
class StageStream:
    """The rows of the stage that `run` is at. The position tells which one that is."""

    run: ResolvedRun
    stream: TrainingStream

    @property
    def waited(self) -> float:
        return self.stream.waited

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.stream)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict() | {STAGE: self.run.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position in this stage. Call this before the first batch."""
        position = {name: value for name, value in state.items() if name != STAGE}
        if position:  # otherwise it is the start of the stage
            self.stream.load_state_dict(position)

    def at(self, state: dict[str, Any]) -> "StageStream":
        """Return a new stream at a position in any stage. Collective."""
        run = self.run.at_stage(state[STAGE])
        with one_start_at_a_time(run.environment.local_rank == 0):
            moved = open_stream(run)
        moved.load_state_dict(state)
        assert isinstance(moved, StageStream)  # there are several stages
        return moved
