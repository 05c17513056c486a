"""What lies in the folder of a run of a study, and the check that the folder belongs to the run as it is defined now.

definition.json is written when the run begins. Resuming the run with another definition is an error, because the run
would mix results of two configurations.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from infini_ds.checkpoint.manifest import MANIFEST
from infini_ds.config.loader import Loader, show
from infini_ds.config.recipe import RENAMED, Recipe
from infini_ds.study.grid import Run, flatten, format_value
from infini_ds.utils.atomic import write_json_atomic
from infini_ds.utils.errors import UserError

DEFINITION = "definition.json"
PATH_KEYS = ("output", "data.path", "data.cache", "model.start_from")  # recipe keys that have no effect on results


def checkpoint_folder(run: Run, step: int) -> Path:
    return run.folder / "checkpoints" / f"step-{step:06d}"


def evaluation_folder(run: Run, step: int) -> Path:
    return run.folder / "evaluation" / f"step-{step:06d}"


def model_folder(run: Run, step: int) -> Path:
    """Return the folder of the model to evaluate at a step: the start model, a checkpoint, or the export."""
    if step == 0:
        return run.folder / "start"
    return run.export if step == run.recipe.steps else checkpoint_folder(run, step)


def is_trained(run: Run) -> bool:
    return (checkpoint_folder(run, run.recipe.steps) / MANIFEST).is_file()


def definition(run: Run) -> dict[str, Any]:
    """Return everything that a run's results depend on, except its data, whose hashes the training compares itself."""
    return {"recipe": _recipe_keys(run.recipe), "start_from": run.start.name if run.start else None}


def check_definition(run: Run) -> None:
    """Raise a UserError if the run's folder was begun with another definition, because the study file has changed."""
    file = run.folder / DEFINITION
    if not file.is_file():
        return
    begun, now = _read_definition(file), definition(run)
    before = begun["recipe"] | {"start_from": begun["start_from"]}
    after = now["recipe"] | {"start_from": now["start_from"]}
    for key in after | before:  # either may lack a key of model.config
        if before.get(key) != after.get(key):
            raise UserError(
                f"{key}={show(after.get(key))}, but {run.folder} was begun with {show(before.get(key))}: give the "
                "study another name=, or remove that folder"
            )


def _read_definition(file: Path) -> dict[str, Any]:
    """Return the content of a definition.json with today's names of keys, also that of an earlier version."""
    content = json.loads(file.read_text(encoding="utf-8"))
    loader = Loader(Recipe, RENAMED, read_renamed=True)
    try:
        loader.add_overrides([f"{key}={format_value(value)}" for key, value in content["recipe"].items()], f"in {file}")
        recipe = loader.build()
    except UserError as error:
        raise UserError(
            f"{error}: this run was begun with another version of infini_ds and cannot be resumed with this one, so "
            f"give the study another name=, or remove {file.parent}"
        ) from error
    return {"recipe": _recipe_keys(recipe), "start_from": content["start_from"]}


def _recipe_keys(recipe: Recipe) -> dict[str, Any]:
    keys = flatten(recipe.model_dump(mode="json"))
    return {key: value for key, value in keys.items() if key not in PATH_KEYS}


def begin(run: Run) -> None:
    """Create the run's folder, with its definition and, if it starts from another run, the model of its step 0.

    Raises:
        UserError: the folder has another definition, or the run that this one starts from is not finished.
    """
    check_definition(run)
    if run.start and not run.start.export.is_dir():
        raise UserError(f"{run.name} starts from {run.start.name}, which is not finished: run that first")
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(run.folder / DEFINITION, definition(run))
    if run.start and not model_folder(run, 0).is_dir():
        write_start_model(run)


def write_start_model(run: Run) -> None:
    """Copy the export that the run starts from to RUN/start, with this run's segment length and memory rule."""
    assert run.start is not None
    folder = model_folder(run, 0)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(run.start.export, partial)
    config = json.loads((partial / "config.json").read_text())
    config |= {"segment_length": run.segment_length, "memory_rule": run.memory_rule}
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    os.replace(partial, folder)
