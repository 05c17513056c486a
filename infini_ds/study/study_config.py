"""The sections of a study file (launch/studies/*.yaml), and how it is loaded and checked.

study = load_study("launch/studies/small.yaml", ["name=stories", "data.source=text:FOLDER"])
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.options import PrepareOptions
from infini_ds.config.keys import Section
from infini_ds.config.loader import load_keys
from infini_ds.config.sections import FolderName, PathText
from infini_ds.utils.errors import UserError, did_you_mean

DATA_OPTIONS_SET_BY_STUDY = {"out", "sequence_length", "force"}


class ArmSection(Section):
    """Runs of one kind, such as pre-training.

    `grid` is a list of products: `[{seed: [0, 1], model.segment_length: [32, 64]}]` gives four runs.
    """

    start_from: str | None = None  # the arm whose exported models these runs start from
    recipe: dict[str, Any] = {}  # recipe keys that all runs of the arm share
    grid: list[dict[str, Any]] = []  # {axis: values}; a recipe key or context_length


class EvaluationSection(Section):
    """Which tasks are evaluated at which step, and their options. A task whose data is null is left out."""

    # At step 0 of a run that starts from another run, at each multiple of checkpoint.keep_every, and at the last step.
    along: list[str] = ["blimp", "glue"]
    last: list[str] = ["position"]  # at the last step only
    blimp: str | None = None  # a folder of JSONL files, or the dataset's name on the hub
    glue: str | None = None  # a folder with the tasks' files, or "hub"
    options: dict[str, Any] = {}  # other options: `limit: 40` becomes `--limit 40`

    def tasks_at(self, is_last_step: bool) -> list[str]:
        """Return the tasks to evaluate, without those that have no data."""
        tasks = dict.fromkeys([*self.along, *(self.last if is_last_step else ())])
        return [task for task in tasks if getattr(self, task, "") is not None]

    def options_for(self, tasks: list[str]) -> dict[str, Any]:
        """Return the evaluation script's options for these tasks, by name."""
        data = {task: getattr(self, task) for task in tasks if getattr(self, task, None) is not None}
        return {"tasks": tasks} | data | self.options


class Study(Section):
    name: FolderName = "study"  # the study's folder is output/name
    output: PathText = "studies"
    config: PathText | None = None  # the recipe that all runs share
    recipe: dict[str, Any] = {}  # recipe keys that override it
    context_length: int = 512  # tokens in a row, unless it is an axis of the grid
    data: dict[str, Any] = {}  # options of data_prep, such as source: text:FOLDER
    arms: dict[str, ArmSection] = {}
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
    return study


def _check_data(data: dict[str, Any]) -> None:
    known = {option.name for option in dataclasses.fields(PrepareOptions)} - DATA_OPTIONS_SET_BY_STUDY
    for key in data:
        if key not in known:
            raise UserError(f"unknown key data.{key}{did_you_mean(key, known, prefix='data.')}")
    if "source" not in data:
        raise UserError("data.source is missing: give the text, such as data.source=text:FOLDER or data.source=stdlib")
