"""Checks of a recipe that need more than one key, or a file of this machine."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.synthetic.specs import parse_task
from infini_ds.config.key_types import split_tasks
from infini_ds.config.sections import DataSection, Recipe
from infini_ds.utils.errors import UserError


@dataclass(frozen=True)
class Conflict:
    """Why no run could have these values. keys: those that are to be changed. sentence: with values and remedy."""

    keys: tuple[str, ...]
    sentence: str


def find_conflict(recipe: Recipe) -> Conflict | None:
    """Return the first conflict between keys of the recipe, or None."""
    batch, schedule, validation, checkpoint = recipe.batch, recipe.schedule, recipe.validation, recipe.checkpoint
    if (batch.tokens is None) == (batch.rows is None):
        return Conflict(
            ("batch.tokens", "batch.rows"),
            f"batch.tokens={_show(batch.tokens)} and batch.rows={_show(batch.rows)}: give exactly one of the two, and "
            "null for the other",
        )
    if schedule.kind == "wsd" and schedule.decay(recipe.steps) < 1:
        return Conflict(
            ("schedule.kind", "schedule.decay_steps"),
            f"schedule.kind=wsd with schedule.decay_steps={schedule.decay_steps} has no decay: give "
            "schedule.decay_steps of at least 1",
        )
    if schedule.warmup(recipe.steps) + schedule.decay(recipe.steps) > recipe.steps:
        return Conflict(
            ("schedule.warmup_steps", "schedule.decay_steps", "steps"),
            f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_steps={schedule.decay_steps} are more "
            f"than steps={recipe.steps}: shorten them, or give shares of the steps, such as schedule.warmup_steps=10%",
        )
    validations, checkpoints = validation.interval(recipe.steps), checkpoint.interval(recipe.steps)
    if checkpoint.keep_best and (not validations or checkpoints % validations):
        return Conflict(
            ("checkpoint.keep_best", "checkpoint.every", "validation.every"),
            "checkpoint.keep_best=true needs a validation at each checkpoint: make checkpoint.every="
            f"{_in_steps(checkpoint.every, checkpoints)} a multiple of validation.every="
            f"{_in_steps(validation.every, validations)}",
        )
    if recipe.stability.on_spike == "roll_back" and not recipe.stability.spike_sigmas:
        return Conflict(
            ("stability.on_spike", "stability.spike_sigmas"),
            "stability.on_spike=roll_back, but with stability.spike_sigmas=0 no loss is a spike: give a number of "
            "standard deviations, or stability.on_spike=flag",
        )
    optimizer = recipe.optimizer
    if optimizer.kind == "muon" and optimizer.gradient_clipping:
        return Conflict(
            ("optimizer.kind", "optimizer.gradient_clipping"),
            f"optimizer.kind=muon with optimizer.gradient_clipping={optimizer.gradient_clipping}: DeepSpeed would clip "
            "Muon's steps, whose size does not depend on the gradient's; give optimizer.gradient_clipping=0",
        )
    if optimizer.kind == "muon" and recipe.stability.check_gradients:
        return Conflict(
            ("optimizer.kind", "stability.check_gradients"),
            "optimizer.kind=muon with stability.check_gradients=true: DeepSpeed keeps Muon's steps in place of the "
            "gradients; give stability.check_gradients=false, or check with optimizer.kind=adamw",
        )
    if recipe.deepspeed != "auto" and not Path(recipe.deepspeed).is_file():
        return Conflict(
            ("deepspeed",), f"deepspeed={recipe.deepspeed} is not a file: give a DeepSpeed JSON file, or auto"
        )
    return (
        _find_conflict_of_recall("validation.recall", validation.recall)
        or _find_conflict_of_streams(recipe.data)
        or _find_conflict_of_curriculum(recipe)
    )


def _find_conflict_of_recall(key: str, recall: str | None, given: str | None = None) -> Conflict | None:
    """Return the first task of `recall` that does not exist. given: the key that holds `key`, if that is in a list."""
    for task in split_tasks(recall):
        try:
            parse_task(task)
        except UserError as error:
            return Conflict((given or key,), f"{key}={recall}: {error}")
    return None


def _find_conflict_of_curriculum(recipe: Recipe) -> Conflict | None:
    data, validation = recipe.data, recipe.validation
    given = "data.curriculum"
    for other, is_given in (("data.path", data.path != DataSection().path), ("data.streams", bool(data.streams))):
        if data.curriculum and is_given:
            value = f"data.path={data.path}" if other == "data.path" else other
            return Conflict(
                (other, given), f"{value} and data.curriculum are both given: name all folders in the stages of one"
            )
    for number, stage in enumerate(data.curriculum):
        name, is_last = f"{given}[{number}]", number == len(data.curriculum) - 1
        ends = {"steps": stage.steps, "until": stage.until}
        if is_last and (key := next((key for key in ends if ends[key] is not None), None)):
            return Conflict(
                (given,), f"{name}.{key}={ends[key]}, but the last stage lasts until steps={recipe.steps}: leave it out"
            )
        if not is_last and stage.steps is None and stage.until is None:
            return Conflict(
                (given,), f"{name}.path={stage.path} has neither steps nor until, so it would not end: give one of them"
            )
        if stage.until is not None and not stage.recall and not validation.recall:
            return Conflict(
                (given,),
                f"{name}.until={stage.until}, but no recall is measured: give validation.recall, such as "
                "validation.recall=pairs,distance=512, or the stage a recall of its own",
            )
        if stage.until is not None and validation.interval(recipe.steps) == 0:
            return Conflict(
                (given, "validation.every"),
                f"{name}.until={stage.until} with validation.every=0: recall is measured by validations, so give "
                "the steps between them",
            )
        if conflict := _find_conflict_of_recall(f"{name}.recall", stage.recall, given):
            return conflict
    return None


def _find_conflict_of_streams(data: DataSection) -> Conflict | None:
    if data.streams and data.path != DataSection().path:
        return Conflict(
            ("data.path", "data.streams"),
            f"data.path={data.path} and data.streams are both given: name the folder among the streams",
        )
    for number, stream in enumerate(data.streams):
        name = f"data.streams[{number}]"
        if stream.proportion is not None and stream.repeat is not None:
            return Conflict(("data.streams",), f"{name} has a proportion and a repeat: give one of the two")
        if (stream.proportion is None) != (data.streams[0].proportion is None):
            return Conflict(
                ("data.streams",),
                f"{name}.proportion={_show(stream.proportion)}: give every stream a proportion, or none",
            )
    return None


def _in_steps(given: int | str, steps: int) -> str:
    """Return a number of steps as it was given; what a share comes to is added."""
    return str(given) if isinstance(given, int) else f"{given} ({steps} steps)"


def _show(value: object) -> str:
    return "null" if value is None else str(value)
