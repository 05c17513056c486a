"""Expand a study's grid into runs: each with a recipe, `key=value` overrides, and maybe a run that it starts from.

runs = expand(load_study("launch/studies/small.yaml"))
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infini_ds.config.recipe import Recipe, load_recipe
from infini_ds.model import InfiniGPTNeoConfig
from infini_ds.study.study_config import ArmSection, Study
from infini_ds.utils.errors import UserError, did_you_mean

CONTEXT_LENGTH = "context_length"  # the only axis that is not a recipe key: tokens in a row
# A run that starts from another one gets another data seed, so that it does not see the rows in the same order again.
DATA_SEED_OFFSET = 1000
SET_BY_STUDY = ("name", "output", "data.path", "model.start_from")  # recipe keys that a study sets itself
MODEL_DEFAULTS = InfiniGPTNeoConfig()
# Axes that a run's name gives in a form of its own; any other one is named by the last part of its key.
NAMED_AXES = (CONTEXT_LENGTH, "seed", "model.segment_length", "model.memory_rule", "schedule.gates")


@dataclass(frozen=True)
class Run:
    """One training run of a study, with its recipe after all overrides."""

    number: int  # from 1, in the order of the study
    name: str
    arm: str
    context_length: int
    config: str | None
    overrides: tuple[str, ...]
    recipe: Recipe
    start: "Run | None"  # the run whose exported model this one starts from

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def cell(self) -> str:
        """The name of the grid cell, which is the run's name without its seed."""
        return self.name.rpartition("-seed")[0]

    @property
    def stage(self) -> int:
        """How many runs have to finish, one after the other, before this one starts."""
        return 0 if self.start is None else self.start.stage + 1

    @property
    def segment_length(self) -> int:
        inherited = self.start.segment_length if self.start else MODEL_DEFAULTS.segment_length
        return self.recipe.model.segment_length or inherited

    @property
    def memory_rule(self) -> str:
        inherited = self.start.memory_rule if self.start else MODEL_DEFAULTS.memory_rule
        return self.recipe.model.memory_rule or inherited

    @property
    def uses_memory(self) -> bool:
        """Whether a row has more than one segment. Otherwise the memory is never read: the model is a plain GPT-Neo."""
        return self.segment_length < self.context_length

    @property
    def gate_schedule(self) -> str:
        """Whether the gates' learning rate is `constant` or `decayed`."""
        schedule = self.recipe.schedule
        return "constant" if "constant" in (schedule.kind, schedule.gates) else "decayed"

    @property
    def gate_init(self) -> float:
        """The gates' beta at the start of the first run of the chain."""
        if self.start:
            return self.start.gate_init
        given = self.recipe.model.gate_init
        return MODEL_DEFAULTS.gate_init if given is None else given

    @property
    def evaluated_steps(self) -> list[int]:
        """Steps whose model is kept: 0 if it starts from another run, each `checkpoint.keep_every` steps, the last."""
        every, steps = self.recipe.checkpoint.keep_every, self.recipe.steps
        kept = range(every, steps, every) if every else ()
        return [*([0] if self.start else []), *kept, steps]

    def recipe_value(self, key: str) -> str:
        """Return the value of a recipe key, as text; "" if the recipe leaves it to the model's defaults."""
        value = flatten(self.recipe.model_dump()).get(key)
        return "" if value is None else format_value(value)

    def override(self, key: str) -> str | None:
        """Return the value that the study gives to a recipe key, as text; None if it gives none."""
        return dict(override.split("=", 1) for override in self.overrides).get(key)


def expand(study: Study) -> list[Run]:
    """Return all runs, each after the run that it starts from.

    Raises:
        UserError: an arm, an axis or a value is invalid; no run or several runs match as the one to start from; or two
            runs have the same name.
    """
    runs: list[Run] = []
    for arm in _arms_in_order(study.arms):
        points = list(_grid_points(arm, study.arms[arm]))
        if not points:
            raise UserError(f"arms.{arm}.grid is empty: give it at least one product, such as [{{seed: [0]}}]")
        runs += _runs_of_arm(study, arm, points, runs)
    by_name: dict[str, Run] = {}
    for run in runs:
        if run.name in by_name:
            raise UserError(f"two runs would be called {run.name}: {_difference(by_name[run.name], run)}")
        by_name[run.name] = run
    return runs


def other_axes(study: Study) -> list[str]:
    """Return the axes of any arm that have no property of `Run`, such as optimizer.learning_rate."""
    axes = (axis for arm in study.arms.values() for product in arm.grid for axis in product)
    return [axis for axis in dict.fromkeys(axes) if axis not in NAMED_AXES]


def _arms_in_order(arms: dict[str, ArmSection]) -> list[str]:
    """Sort the arms so that each comes after the one that it starts from; otherwise keep their order."""
    ordered: list[str] = []
    while len(ordered) < len(arms):
        ready = [arm for arm in arms if arm not in ordered and arms[arm].start_from in (None, *ordered)]
        if not ready:
            arm = next(arm for arm in arms if arm not in ordered)
            start = str(arms[arm].start_from)
            if start not in arms:
                raise UserError(f"arms.{arm}.start_from={start} is not an arm of the study{did_you_mean(start, arms)}")
            raise UserError(f"arms.{arm}.start_from={start} makes a circle: let one of these arms start from none")
        ordered += ready
    return ordered


def _grid_points(arm: str, section: ArmSection) -> Iterator[dict[str, Any]]:
    """Yield each combination of the grid's products once, as `{axis: value}`."""
    seen = []
    for product in section.grid:
        for axis, values in product.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"arms.{arm}.grid: {axis}={values} has to be a list of values")
        for values in itertools.product(*product.values()):
            point = dict(zip(product, values, strict=True))
            if point not in seen:
                seen.append(point)
                yield point


def _runs_of_arm(study: Study, arm: str, points: list[dict[str, Any]], earlier: list[Run]) -> list[Run]:
    section = study.arms[arm]
    runs: list[Run] = []
    axes = list(dict.fromkeys(axis for point in points for axis in point))
    for point in points:
        context_length = point.get(CONTEXT_LENGTH, study.context_length)
        if not isinstance(context_length, int) or context_length < 2:
            raise UserError(
                f"arms.{arm}.grid: {CONTEXT_LENGTH}={context_length} has to be a number of tokens of at least 2"
            )
        of_point = {key: value for key, value in point.items() if key != CONTEXT_LENGTH}
        keys = flatten(study.recipe) | flatten(section.recipe) | of_point
        recipe = _load_recipe(study, arm, keys)
        start = _find_start(study, arm, section.start_from, point, earlier) if section.start_from else None
        run = Run(len(earlier) + len(runs) + 1, "", arm, context_length, study.config, (), recipe, start)
        if run.segment_length > context_length:
            raise UserError(
                f"arm {arm}: model.segment_length={run.segment_length} is longer than a row of {context_length}"
            )
        data_seed = recipe.data.seed
        if "seed" in point and "data.seed" not in keys:
            data_seed = recipe.seed + (DATA_SEED_OFFSET * (start.stage + 1) if start else 0)
        of_run = {"name": _run_name(run, point, axes), "output": str(study.folder / "runs")}
        of_data = {"path": str(study.data_folder(context_length)), "seed": data_seed}
        of_model = {"start_from": str(start.export)} if start else {}
        keys |= of_run | flatten({"data": of_data, "model": of_model})
        data, model = recipe.data.model_copy(update=of_data), recipe.model.model_copy(update=of_model)
        recipe = recipe.model_copy(update=of_run | {"data": data, "model": model})
        overrides = tuple(f"{key}={format_value(value)}" for key, value in keys.items())
        runs.append(replace(run, name=recipe.name, overrides=overrides, recipe=recipe))
    return runs


def _load_recipe(study: Study, arm: str, keys: dict[str, Any]) -> Recipe:
    for key in SET_BY_STUDY:
        if key in keys:
            raise UserError(f"{key} is set by the study itself: leave it out of the recipe and grid of arm {arm}")
    try:
        return load_recipe(
            study.config, [f"{key}={format_value(value)}" for key, value in keys.items()], "in the study"
        )
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from error


def _find_start(study: Study, arm: str, start_from: str, point: dict[str, Any], earlier: list[Run]) -> Run:
    """Return the run of arm `start_from` that has this point's value of each axis that it varies."""
    candidates = [run for run in earlier if run.arm == start_from]
    varied = [
        key
        for key in dict.fromkeys(axis for product in study.arms[start_from].grid for axis in product)
        if len({_axis_value(run, key) for run in candidates}) > 1
    ]
    for key in varied:
        wanted = point.get(key, study.context_length if key == CONTEXT_LENGTH else None)
        formatted = None if wanted is None else format_value(wanted)
        candidates = [run for run in candidates if _axis_value(run, key) == formatted]
    if len(candidates) != 1:
        wanted = ", ".join(f"{key}={point.get(key)}" for key in varied)
        found = "no run" if not candidates else f"{len(candidates)} runs"
        raise UserError(
            f"arms.{arm}: {found} of arm {start_from} to start from with {wanted}: give both grids the same values"
        )
    return candidates[0]


def _axis_value(run: Run, key: str) -> str | None:
    return str(run.context_length) if key == CONTEXT_LENGTH else run.override(key)


def _run_name(run: Run, point: dict[str, Any], axes: list[str]) -> str:
    """Name a run after its configuration, in a form that does not change as the grid grows."""
    parts = [run.arm, f"s{run.segment_length}" if run.uses_memory else "plain", f"c{run.context_length}"]
    if run.uses_memory:
        parts += [run.memory_rule, run.gate_schedule]
    others = [axis for axis in axes if axis in point and axis not in NAMED_AXES]
    parts += [f"{axis.split('.')[-1]}{format_value(point[axis])}" for axis in others]
    parts.append(f"seed{run.recipe.seed}")
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"preset": "tiny"}}` -> `{"model.preset": "tiny"}`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def format_value(value: Any) -> str:
    """Return a value in the form that a `key=value` override has."""
    return value if isinstance(value, str) else json.dumps(value)


def _difference(one: Run, other: Run) -> str:
    differing = sorted(set(one.overrides) ^ set(other.overrides))
    return f"they differ only by {', '.join(differing)}" if differing else "two products of the grid give it"
