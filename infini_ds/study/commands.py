"""The commands of a study: data preparation, and for each run training, export and evaluation.

Each command leaves a file or folder that shows that it is done, so that a study resumes where it stopped.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from infini_ds.evaluation.evaluation_file import read_evaluation
from infini_ds.study.grid import Run
from infini_ds.study.run_folder import evaluation_folder, is_trained, model_folder
from infini_ds.study.study_config import Study


@dataclass(frozen=True)
class Scripts:
    """The scripts that a study starts, relative to the working directory."""

    pretrain: Path
    convert: Path
    evaluate: Path


@dataclass(frozen=True)
class Command:
    """One command line, and whether its result exists."""

    description: str
    arguments: tuple[str, ...]
    is_done: Callable[[], bool]

    def __str__(self) -> str:
        return shlex.join(["python", *self.arguments[1:]])


@dataclass(frozen=True)
class StudyCommands:
    study: Study
    scripts: Scripts

    def prepare_data(self, runs: list[Run]) -> list[Command]:
        """Return the commands that write the rows of each context length; all share the first one's tokenizer."""
        commands = []
        context_lengths = dict.fromkeys(run.context_length for run in runs)
        first = self.study.data_folder(next(iter(context_lengths)))
        for context_length in context_lengths:
            folder = self.study.data_folder(context_length)
            options = self.study.data | {"sequence_length": context_length, "out": str(folder)}
            if folder != first and "tokenizer" not in self.study.data:
                options = {key: value for key, value in options.items() if key not in ("vocab_size", "tokenizer_bytes")}
                options["tokenizer"] = str(first / "tokenizer")
            # Never done, because data_prep itself compares a finished folder with the options.
            arguments = (sys.executable, "-m", "data_prep", *command_line_options(options))
            commands.append(Command(f"text to rows of {context_length} tokens", arguments, lambda: False))
        return commands

    def for_run(self, run: Run) -> list[Command]:
        """Return the commands of a run, in order, given its data and the export that it starts from."""
        config = ("--config", run.config) if run.config else ()
        train = (sys.executable, str(self.scripts.pretrain), *config, *run.overrides)
        export = (sys.executable, str(self.scripts.convert), str(run.folder), "--out", str(run.export))
        return [
            Command("training", train, lambda: run.export.is_dir() or is_trained(run)),
            Command("export", export, run.export.is_dir),
            *self._evaluations(run),
        ]

    def _evaluations(self, run: Run) -> list[Command]:
        commands = []
        for step in run.evaluated_steps:
            tasks = self.study.evaluation.tasks_at(step == run.recipe.steps)
            if not tasks:
                continue
            out = evaluation_folder(run, step)
            options = {"seed": run.recipe.seed} | self.study.evaluation.options_for(tasks) | {"out": str(out)}
            if "position" in tasks:
                options["data"] = str(self.study.data_folder(run.context_length))
            model = str(model_folder(run, step))
            arguments = (sys.executable, str(self.scripts.evaluate), model, *command_line_options(options))
            is_done = partial(evaluated_by, out, tasks, arguments)
            commands.append(Command(f"evaluation of step {step}", arguments, is_done))
        return commands

    def is_done(self, run: Run) -> bool:
        return all(command.is_done() for command in self.for_run(run))


def command_line_options(options: dict[str, Any]) -> list[str]:
    """`{"vocab_size": 2048}` -> `["--vocab-size", "2048"]`; a list gives several values, true and null give none."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True or value is None else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def evaluated_by(folder: Path, tasks: list[str], arguments: tuple[str, ...]) -> bool:
    """Return whether the folder has results of all tasks that were computed with exactly these options."""
    evaluation = read_evaluation(folder)
    if evaluation is None:
        return False
    recorded = [shlex.split(evaluation.tasks.get(task, {}).get("command", "")) for task in tasks]
    return all(words[2:] == list(arguments[2:]) for words in recorded)
