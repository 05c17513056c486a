"""The sections of a study file (launch/studies/*.yaml), and how it is loaded and checked.

study = load_study("launch/studies/small.yaml", ["name=stories", "data.source=text:FOLDER"])
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import infini_ds.evaluation.tasks  # noqa: F401, registers the tasks
from data_prep.options import PrepareOptions
from infini_ds.config.keys import Section, key
from infini_ds.config.loader import load_keys
from infini_ds.config.sections import FolderName, PathText
from infini_ds.evaluation.task import TASKS
from infini_ds.utils.errors import UserError, did_you_mean

DATA_OPTIONS_SET_BY_STUDY = {"out", "sequence_length", "force"}


class ArmSection(Section):
    """Runs of one kind, such as pre-training.

    `grid` is a list of products: `[{seed: [0, 1], model.segment_length: [32, 64]}]` gives four runs.
    """

    start_from: str | None = key(None, "the arm whose exported models these runs start from")
    recipe: dict[str, Any] = key({}, "recipe keys that all runs of the arm share")
    grid: list[dict[str, Any]] = key([], "products of axes, each {axis: values}; a recipe key or context_length")


class EvaluationSection(Section):
    """Which tasks are evaluated at which step, and their options. A task whose data is null is left out."""

    along: list[str] = key(
        ["blimp", "glue"],
        "tasks at step 0 of runs that start from others, at multiples of checkpoint.keep_every, and at the last step",
    )
    last: list[str] = key(["position"], "tasks of the last step only")
    blimp: str | None = key(None, "a folder of BLiMP's or BabyLM's files, or the dataset's name on the hub")
    glue: str | None = key(None, "a folder with the tasks' files, or hub")
    options: dict[str, Any] = key({}, "other options of the evaluation: `limit: 40` becomes `--limit 40`")

    def tasks_at(self, is_last_step: bool) -> list[str]:
        """Return the tasks to evaluate, without those that have no data."""
        tasks = dict.fromkeys([*self.along, *(self.last if is_last_step else ())])
        return [task for task in tasks if getattr(self, task, "") is not None]

    def options_for(self, tasks: list[str]) -> dict[str, Any]:
        """Return the evaluation script's options for these tasks, by name."""
        data = {task: getattr(self, task) for task in tasks if getattr(self, task, None) is not None}
        return {"tasks": tasks} | data | self.options


class Study(Section):
    name: FolderName = key("study", "the study's folder is output/name")
    output: PathText = key("studies", "the folder of all studies")
    config: PathText | None = key(None, "the recipe that all runs share")
    recipe: dict[str, Any] = key({}, "recipe keys that override it")
    context_length: int = key(512, "tokens in a row, unless it is an axis of the grid", ge=2)
    data: dict[str, Any] = key({}, "options of data_prep, such as source: text:FOLDER")
    arms: dict[str, ArmSection] = key({}, "kinds of runs, by name")
    evaluation: EvaluationSection = EvaluationSection()

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def data_folder(self, context_length: int) -> Path:
        return self.folder / "data" / f"rows-of-{context_length}"


def load_study(path: str | Path, overrides: Sequence[str] = (), shipped: str | Path = "launch/studies") -> Study:
    """Load a study file, apply `key=value` overrides, and check it.

    Args:
        shipped: folder of the project's own study files, which an error names if `path` does not exist.
    Raises:
        UserError: the file does not exist, a key is unknown (the nearest known one is named), or a value is invalid.
    """
    study = load_keys(Study, path, overrides, "study", str(shipped))
    if not study.arms:
        raise UserError(
            f"{path} has no arms: give it at least one, such as arms: {{pretrain: {{grid: [{{seed: [0]}}]}}}}"
        )
    _check_data(study.data)
    _check_tasks(study.evaluation)
    return study


def _check_data(data: dict[str, Any]) -> None:
    known = {option.name for option in dataclasses.fields(PrepareOptions)} - DATA_OPTIONS_SET_BY_STUDY
    for name in data:
        if name not in known:
            raise UserError(f"unknown key data.{name}{did_you_mean(name, known, prefix='data.')}")
    if "source" not in data:
        raise UserError("data.source is missing: give the text, such as data.source=text:FOLDER or data.source=stdlib")


def _check_tasks(evaluation: EvaluationSection) -> None:
    for name, tasks in (("along", evaluation.along), ("last", evaluation.last)):
        for task in tasks:
            if task not in TASKS:
                raise UserError(f"evaluation.{name}: {task} is not a task{did_you_mean(task, TASKS)}")
