"""evaluation.json: the results of one model, task by task."""

import platform
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import infini_ds.evaluation.tasks  # noqa: F401, registers the tasks
from infini_ds.evaluation.model_loading import ModelFacts
from infini_ds.evaluation.result_cache import read_results, write_results
from infini_ds.evaluation.serialization import from_json
from infini_ds.evaluation.task import TASKS, TaskResult

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """The results of one model.

    command, seed: of the last call.
    versions: of Python and the libraries.
    tasks: each task's result in JSON form, with the `command` and the `seed` that it was computed with.
    """

    model: ModelFacts
    command: str
    seed: int
    versions: dict[str, str]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def result(self, task: str) -> TaskResult | None:
        """Return the typed result of a registered task, or None if it was not evaluated."""
        return from_json(TASKS[task].result_type, self.tasks[task]) if task in self.tasks else None

    def with_result(self, task: str, result: TaskResult) -> "Evaluation":
        """Return this evaluation with a task's result in place of an earlier one."""
        entry = asdict(result) | {"command": self.command, "seed": self.seed}
        return replace(self, tasks=self.tasks | {task: entry})


def start_evaluation(folder: Path, model: ModelFacts, command: str, seed: int) -> Evaluation:
    """Return the evaluation to add results to. It keeps the results in `folder` if they are of the same model."""
    earlier = read_evaluation(folder)
    tasks = earlier.tasks if earlier and earlier.model.sha256 == model.sha256 else {}
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}
    return Evaluation(model, command, seed, versions, tasks)


def read_evaluation(folder: Path) -> Evaluation | None:
    """Return the evaluation in a folder of results, or None if it holds none.

    Raises:
        UserError: its evaluation.json is damaged.
    """
    return read_results(folder / EVALUATION_FILE, Evaluation)


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json.

    Raises:
        UserError: the folder cannot be written.
    """
    write_results(folder / EVALUATION_FILE, asdict(evaluation))
