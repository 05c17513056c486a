"""The stages of a run: parts that follow each other, each on data of its own. Without a curriculum there is one."""

from dataclasses import dataclass
from typing import Any

from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.recipe import Recipe
from infini_ds.data.sources import DataSource


@dataclass(frozen=True)
class StageEnd:
    """When the next stage begins, whichever comes first.

    Attributes:
        steps: most steps of the stage; None for no limit.
        until: accuracy of recall at a validation; None for no such end.
        recall_tasks: whose mean accuracy that is; they are measured in the stage.
    """

    steps: int | None = None
    until: float | None = None
    recall_tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResolvedStage:
    """What a stage reads, and how.

    Attributes:
        sources: the prepared data, a source for each stream; empty if it was neither found nor required.
        sequence_length: tokens of a row.
        batch_shape: how the rows of a step are divided.
        deepspeed: the configuration for `deepspeed.initialize`, without "auto".
        first_row: training rows of all earlier stages, from which on those of this one are numbered.
    """

    sources: tuple[DataSource, ...]
    sequence_length: int
    batch_shape: BatchShape
    deepspeed: dict[str, Any]
    end: StageEnd = StageEnd()
    first_row: int = 0


def stage_ends(recipe: Recipe) -> list[StageEnd]:
    """Return when each stage of the recipe ends."""
    tasks = recipe.validation.recall_tasks
    return [
        StageEnd(stage.most_steps(recipe.steps), stage.until, stage.recall_tasks or tasks)
        for stage in recipe.data.curriculum
    ] or [StageEnd(recall_tasks=tasks)]
