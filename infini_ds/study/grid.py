"""A study in YAML -> its runs: a recipe and `key=value` overrides each, and maybe a run whose export it starts from.

study = load_study("launch/studies/small.yaml", ["name=stories", "data.source=text:FOLDER"])
runs = expand(study)
"""

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.options import PrepareOptions
from infini_ds.config.recipe import Recipe, load_keys, load_recipe
from infini_ds.utils.errors import UserError

CONTEXT = "context_length"  # the axis that is no key of a recipe: tokens of a row, so the longest reach of training
DEFAULT_SEGMENT = 128  # of InfiniGPTNeoConfig
ORDER_APART = 1000  # between the seeds of the order of rows of a run and of the one that it starts from
OF_THE_STUDY = ("name", "output", "data.path", "model.start_from")  # keys of a recipe that a study sets itself


@dataclass(frozen=True)
class ArmRecipe:
    """Runs of one kind. `grid` is a list of products: `[{seed: [0, 1], model.segment_length: [32, 64]}]` is four."""

    start_from: str | None = None  # the arm whose exports these runs start from
    recipe: dict[str, Any] = field(default_factory=dict)  # keys of the recipe that all of them have
    grid: list[dict[str, Any]] = field(default_factory=list)  # axis -> values; axes are keys of the recipe


@dataclass(frozen=True)
class EvaluationRecipe:
    """Tasks of launch/evaluate.py, of those that are given their data."""

    # At step 0 of a run that starts from another, at each step that checkpoint.keep_every divides, and at the last.
    along: list[str] = field(default_factory=lambda: ["blimp", "glue"])
    last: list[str] = field(default_factory=lambda: ["position"])  # at the last step alone
    blimp: str | None = None  # folder of its JSONL files, or its name on the hub; None leaves it out
    glue: str | None = None  # folder of its tasks, or "hub"; None leaves it out
    options: dict[str, Any] = field(default_factory=dict)  # any other option: `limit: 40` is `--limit 40`

    def tasks(self, is_last: bool) -> list[str]:
        chosen = dict.fromkeys([*self.along, *(self.last if is_last else ())])
        return [task for task in chosen if getattr(self, task, "") is not None]

    def arguments(self, tasks: list[str]) -> dict[str, Any]:
        """Options of launch/evaluate.py, by name."""
        data = {task: getattr(self, task) for task in tasks if getattr(self, task, None) is not None}
        return {"tasks": tasks} | data | self.options


@dataclass(frozen=True)
class Study:
    name: str = "study"  # its folder is output/name
    output: str = "studies"
    config: str | None = None  # the recipe that all runs have
    recipe: dict[str, Any] = field(default_factory=dict)  # keys over it
    context_length: int = 512  # tokens of a row, where it is no axis
    data: dict[str, Any] = field(default_factory=dict)  # options of data_prep, such as source: text:FOLDER
    arms: dict[str, ArmRecipe] = field(default_factory=dict)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def data_folder(self, context_length: int) -> Path:
        return self.folder / "data" / f"rows-of-{context_length}"


@dataclass(frozen=True)
class Run:
    """One run of a study. `start`: the run that it starts from; `recipe`: what its overrides come to."""

    number: int  # from 1, in the order of the study
    name: str
    arm: str
    context_length: int
    config: str | None
    overrides: tuple[str, ...]
    recipe: Recipe
    start: "Run | None"

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def stage(self) -> int:
        return 0 if self.start is None else self.start.stage + 1

    @property
    def segment_length(self) -> int:
        return self.recipe.model.segment_length or (self.start.segment_length if self.start else DEFAULT_SEGMENT)

    @property
    def memory_rule(self) -> str:
        return self.recipe.model.memory_rule or (self.start.memory_rule if self.start else "linear")

    @property
    def is_plain(self) -> bool:
        """Whether its rows are one segment each: its memory is never read, so it is GPT-Neo."""
        return self.segment_length >= self.context_length

    @property
    def gates(self) -> str:
        """Whether the gates' learning rate is `constant` or `decayed`."""
        schedule = self.recipe.schedule
        return "constant" if "constant" in (schedule.kind, schedule.gates) else "decayed"

    @property
    def gate_start(self) -> float:
        """Where its gates beta start: a plain run hands them on untouched."""
        if self.start:
            return self.start.gate_start
        return self.recipe.model.gate_init or 0.0

    @property
    def evaluated_steps(self) -> list[int]:
        """Steps whose model is kept: 0 where it starts from another run's, then as `checkpoint.keep_every` says."""
        every, steps = self.recipe.checkpoint.keep_every, self.recipe.steps
        kept = range(every, steps, every) if every else ()
        return [*([0] if self.start else []), *kept, steps]


def load_study(path: str | Path, overrides: list[str] = ()) -> Study:
    """
    Raises:
        UserError: no such file, an unknown key (the nearest known one is named), or a value that cannot be.
    """
    free = ("recipe.", "data.", "evaluation.options.", "arms.")
    study = load_keys(Study, path, overrides, "study", "launch/studies", free)
    if study.name in ("", ".", "..") or "/" in study.name:
        raise UserError(f"name={study.name!r} must be the name of one folder: put the path in output=")
    if not study.arms:
        raise UserError(
            f"{path} has no arms: give it at least one, such as arms: {{pretrain: {{grid: [{{seed: [0]}}]}}}}"
        )
    _check_data(study)
    return study


def _check_data(study: Study) -> None:
    known = {f.name for f in dataclasses.fields(PrepareOptions)} - {"out", "sequence_length", "force"}
    for key in study.data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean data.{near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise UserError(f"unknown key data.{key}: {hint}")
    if "source" not in study.data:
        raise UserError("data.source is missing: give the text, such as data.source=text:FOLDER, or stdlib")


def expand(study: Study) -> list[Run]:
    """All runs, each behind the one that it starts from.

    Raises:
        UserError: an arm, axis or value that cannot be, no run or several to start from, or two runs of one name.
    """
    runs: list[Run] = []
    for arm in _in_order(study.arms):
        points = list(_points(arm, study.arms[arm]))
        if not points:
            raise UserError(f"arms.{arm}.grid is empty: give it at least one product, such as [{{seed: [0]}}]")
        runs += _runs_of(study, arm, points, runs)
    by_name: dict[str, Run] = {}
    for run in runs:
        if run.name in by_name:
            raise UserError(f"two runs would be called {run.name}: {_difference(by_name[run.name], run)}")
        by_name[run.name] = run
    return runs


def _in_order(arms: dict[str, ArmRecipe]) -> list[str]:
    """Arms, each behind the one that it starts from, otherwise as they are given."""
    ordered: list[str] = []
    while len(ordered) < len(arms):
        ready = [arm for arm in arms if arm not in ordered and arms[arm].start_from in (None, *ordered)]
        if not ready:
            arm = next(arm for arm in arms if arm not in ordered)
            start = arms[arm].start_from
            near = difflib.get_close_matches(start, arms, n=1)
            reason = "starts from itself in the end" if start in arms else "is no arm"
            hint = f"; did you mean {near[0]}?" if near and start not in arms else ""
            raise UserError(f"arms.{arm}.start_from={start} {reason}{hint}")
        ordered += ready
    return ordered


def _points(arm: str, described: ArmRecipe) -> Iterator[dict[str, Any]]:
    """Each combination once, `{axis: value}`."""
    seen = []
    for product in described.grid:
        for axis, values in product.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"arms.{arm}.grid: {axis}={values} has to be a list of values")
        for values in itertools.product(*product.values()):
            point = dict(zip(product, values, strict=True))
            if point not in seen:
                seen.append(point)
                yield point


def _runs_of(study: Study, arm: str, points: list[dict], earlier: list[Run]) -> list[Run]:
    described = study.arms[arm]
    runs: list[Run] = []
    axes = list(dict.fromkeys(axis for point in points for axis in point))
    for point in points:
        context = point.get(CONTEXT, study.context_length)
        if not isinstance(context, int) or context < 2:
            raise UserError(f"arms.{arm}.grid: {CONTEXT}={context} has to be a number of tokens of at least 2")
        keys = flat(study.recipe) | flat(described.recipe) | {key: point[key] for key in point if key != CONTEXT}
        recipe = _recipe(study, arm, keys)
        start = _find_start(study, arm, described.start_from, point, earlier) if described.start_from else None
        run = Run(len(earlier) + len(runs) + 1, "", arm, context, study.config, (), recipe, start)
        if run.segment_length > context:
            raise UserError(f"arm {arm}: model.segment_length={run.segment_length} is longer than a row of {context}")
        order = recipe.data.seed
        if "seed" in point and "data.seed" not in keys:
            order = recipe.seed + (ORDER_APART * (start.stage + 1) if start else 0)
        own = {"name": _name(run, point, axes), "output": str(study.folder / "runs")}
        of_data = {"path": str(study.data_folder(context)), "seed": order}
        of_model = {"start_from": str(start.export)} if start else {}
        keys |= own | flat({"data": of_data, "model": of_model})
        recipe = replace(recipe, data=replace(recipe.data, **of_data), model=replace(recipe.model, **of_model), **own)
        overrides = tuple(f"{key}={_written(value)}" for key, value in keys.items())
        runs.append(replace(run, name=recipe.name, overrides=overrides, recipe=recipe))
    return runs


def _recipe(study: Study, arm: str, keys: dict[str, Any]) -> Recipe:
    for key in OF_THE_STUDY:
        if key in keys:
            raise UserError(f"{key} is set by the study itself: leave it out of the recipe and grid of arm {arm}")
    try:
        return load_recipe(study.config, [f"{key}={_written(value)}" for key, value in keys.items()])
    except UserError as error:
        raise UserError(f"arm {arm}: {str(error).replace('the command line', 'the study')}") from error


def _find_start(study: Study, arm: str, start_from: str, point: dict, earlier: list[Run]) -> Run:
    """The run of the other arm with the same value of each axis that it varies."""
    candidates = [run for run in earlier if run.arm == start_from]
    varied = [
        key
        for key in dict.fromkeys(axis for product in study.arms[start_from].grid for axis in product)
        if len({_value(run, key) for run in candidates}) > 1
    ]
    for key in varied:
        wanted = point.get(key, study.context_length if key == CONTEXT else None)
        written = None if wanted is None else _written(wanted)
        candidates = [run for run in candidates if _value(run, key) == written]
    if len(candidates) != 1:
        wanted = ", ".join(f"{key}={point.get(key)}" for key in varied)
        found = "no run" if not candidates else f"{len(candidates)} runs"
        raise UserError(f"arms.{arm}: {found} of arm {start_from} to start from with {wanted}")
    return candidates[0]


def _value(run: Run, key: str) -> str | None:
    if key == CONTEXT:
        return str(run.context_length)
    return dict(override.split("=", 1) for override in run.overrides).get(key)


def _name(run: Run, point: dict, axes: list[str]) -> str:
    """What it is, in words that do not change as the grid grows; any other axis by its last word and value."""
    shape = ["plain"] if run.is_plain else [f"s{run.segment_length}"]
    parts = [run.arm, *shape, f"c{run.context_length}"]
    if not run.is_plain:
        parts += [run.memory_rule, run.gates]
    named = (CONTEXT, "seed", "model.segment_length", "model.memory_rule", "schedule.gates")
    parts += [f"{axis.split('.')[-1]}{_written(point[axis])}" for axis in axes if axis in point and axis not in named]
    parts.append(f"seed{run.recipe.seed}")
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts)


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """`{"model": {"preset": "tiny"}}` -> `{"model.preset": "tiny"}`."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _written(value: Any) -> str:
    """A value as an override gives it."""
    return value if isinstance(value, str) else json.dumps(value)


def _difference(one: Run, other: Run) -> str:
    differing = sorted(set(one.overrides) ^ set(other.overrides))
    return f"they differ by {', '.join(differing)} alone" if differing else "two products of the grid give it"
