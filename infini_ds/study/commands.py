"""What one run of a study takes, as commands that each leave a file or folder: training, export, evaluations."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from infini_ds.checkpoint.manifest import MANIFEST
from infini_ds.study.grid import Run, Study, flat
from infini_ds.utils.errors import UserError

DEFINITION = "definition.json"
PLACES = ("output", "data.path", "data.cache", "model.start_from")  # of a recipe; where things lie changes no number


@dataclass(frozen=True)
class Step:
    """A command, and whether what it makes is there."""

    what: str
    command: tuple[str, ...]
    is_done: Callable[[], bool]


def data_steps(study: Study, runs: list[Run]) -> list[Step]:
    """The text as rows of each context length; the first one's tokenizer serves all."""
    steps = []
    contexts = dict.fromkeys(run.context_length for run in runs)
    first = study.data_folder(next(iter(contexts)))
    for context in contexts:
        folder = study.data_folder(context)
        options = study.data | {"sequence_length": context, "out": str(folder)}
        if folder != first and "tokenizer" not in study.data:
            options = {key: value for key, value in options.items() if key not in ("vocab_size", "tokenizer_bytes")}
            options["tokenizer"] = str(first / "tokenizer")
        # Asked each time: data_prep itself says whether what is there was made so.
        command = (sys.executable, "-m", "data_prep", *flags(options))
        steps.append(Step(f"text to rows of {context} tokens", command, lambda: False))
    return steps


def flags(options: dict) -> list[str]:
    """`{"vocab_size": 2048}` -> `["--vocab-size", "2048"]`; a list gives several values, true and null none."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True or value is None else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def run_steps(study: Study, run: Run) -> list[Step]:
    """Everything that a run takes once the data and the run that it starts from are there."""
    python = sys.executable
    config = ("--config", run.config) if run.config else ()
    train = (python, "launch/pretrain.py", *config, *run.overrides)
    export = (python, "launch/convert.py", str(run.folder), "--out", str(run.export))
    steps = [
        Step("training", train, lambda: run.export.is_dir() or is_trained(run)),
        Step("export", export, run.export.is_dir),
    ]
    for step in run.evaluated_steps:
        if tasks := study.evaluation.tasks(step == run.recipe.steps):
            out = evaluation_folder(run, step)
            options = {"seed": run.recipe.seed} | study.evaluation.arguments(tasks) | {"out": str(out)}
            if "position" in tasks:
                options["data"] = str(study.data_folder(run.context_length))
            command = (python, "launch/evaluate.py", str(model_at(run, step)), *flags(options))
            steps.append(Step(f"evaluation of step {step}", command, partial(has, out, tasks, command)))
    return steps


def is_trained(run: Run) -> bool:
    return (checkpoint(run, run.recipe.steps) / MANIFEST).is_file()


def checkpoint(run: Run, step: int) -> Path:
    return run.folder / "checkpoints" / f"step-{step:06d}"


def evaluation_folder(run: Run, step: int) -> Path:
    return run.folder / "evaluation" / f"step-{step:06d}"


def model_at(run: Run, step: int) -> Path:
    if step == 0:
        return run.folder / "start"
    return run.export if step == run.recipe.steps else checkpoint(run, step)


def has(folder: Path, tasks: list[str], command: tuple[str, ...]) -> bool:
    """Whether all of these tasks have been evaluated there with the very options of this command."""
    found = read_evaluation(folder).get("tasks", {})
    made_by = [shlex.split(found.get(task, {}).get("command", "")) for task in tasks]
    return all(words[2:] == list(command[2:]) for words in made_by)


def readable(command: tuple[str, ...]) -> str:
    return shlex.join(["python", *command[1:]])


def read_evaluation(folder: Path) -> dict:
    try:
        return json.loads((folder / "evaluation.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def is_done(study: Study, run: Run) -> bool:
    return all(step.is_done() for step in run_steps(study, run))


def definition(run: Run) -> dict:
    """All that a run's numbers come from, but for its data, whose hashes the run compares itself."""
    keys = {key: value for key, value in flat(asdict(run.recipe)).items() if key not in PLACES}
    return {"recipe": keys, "start_from": run.start.name if run.start else None}


def check_definition(run: Run) -> None:
    """Raise a UserError if the run's folder was begun with another definition: a grid was changed under its name."""
    file = run.folder / DEFINITION
    if not file.is_file():
        return
    begun, now = flat(json.loads(file.read_text())), flat(json.loads(json.dumps(definition(run))))
    for key in now | begun:
        if begun.get(key) != now.get(key):
            raise UserError(
                f"{key.removeprefix('recipe.')}={now.get(key)}, but {run.folder} was begun with {begun.get(key)}: give "
                f"the study another name=, or remove that folder"
            )


def begin(run: Run) -> None:
    """Make the run's folder, with its definition and, if it starts from another run, the model of its step 0.

    Raises:
        UserError: another definition, or the run that it starts from is not there.
    """
    check_definition(run)
    if run.start and not run.start.export.is_dir():
        raise UserError(f"{run.name} starts from {run.start.name}, which is not finished: run that first")
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / DEFINITION).write_text(json.dumps(definition(run), indent=1))
    if run.start and not model_at(run, 0).is_dir():
        write_start(run)


def write_start(run: Run) -> None:
    """The model that the run starts from, with this run's segments: the export of the other, configured anew."""
    folder = model_at(run, 0)
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(run.start.export, unfinished)
    config = json.loads((unfinished / "config.json").read_text())
    config |= {"segment_length": run.segment_length, "memory_rule": run.memory_rule}
    (unfinished / "config.json").write_text(json.dumps(config, indent=2))
    os.replace(unfinished, folder)
