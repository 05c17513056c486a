"""What an evaluation task is, and the registry of tasks.

A task is one file in `infini_ds/evaluation/tasks/`. The command line builds its options, its help text and its dispatch
from the registry, and a study its table of results, so a new task changes no other file:

    @dataclass(frozen=True)
    class WordsResult(TaskResult):
        loss: float

        def tidy_rows(self) -> list[TidyRow]:
            return [TidyRow("on", "loss", self.loss)]

    @register_task
    class Words(EvaluationTask[WordsResult]):
        name = "words"
        help = "loss on a list of words"
        result_type = WordsResult

        def add_arguments(self, parser): ...
        def run(self, model, context): ...
        def headline(self, result): ...
        def table(self, result): ...
        def plot(self, result, folder): ...
"""

import argparse
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from rich.console import RenderableType

from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.result_cache import ResultCache
from infini_ds.utils.errors import UserError


class Headline(NamedTuple):
    """The one score that stands for a result, such as ("accuracy", 0.61). `tidy_rows` has it under the same name."""

    name: str
    value: float


class TidyRow(NamedTuple):
    """One number of a result. setting: of the memory ("on", "off" or "other"), or "" where it does not apply."""

    setting: str
    metric: str
    value: float


@dataclass(frozen=True)
class DataFacts:
    """What a result records of its data: where they are, and a SHA-256 of all that was used of them."""

    path: str
    sha256: str


@dataclass(frozen=True)
class TaskResult(ABC):
    """What a task measured. Its fields are the keys of the task's entry in evaluation.json."""

    @abstractmethod
    def tidy_rows(self) -> list[TidyRow]:
        """Return all scores as rows of a table, for the results.csv of a study."""


R = TypeVar("R", bound=TaskResult)


@dataclass(frozen=True)
class EvaluationContext:
    """What a task is given besides the model.

    cache: finished parts of earlier calls.
    arguments: all options of the command line, the task's own among them.
    seed: of everything that a task draws at random.
    limit: examples to use of each data set, for a quick trial; None for all.
    batch_tokens: tokens to compute at once, padding included. No result depends on it beyond rounding.
    """

    cache: ResultCache
    arguments: argparse.Namespace
    seed: int
    limit: int | None
    batch_tokens: int


class EvaluationTask(ABC, Generic[R]):
    """A task: its options, how to run it, and how to show its result."""

    name: ClassVar[str]  # of the task on the command line, and of its entry in evaluation.json
    help: ClassVar[str]  # what it measures, in one line
    result_type: type[R]

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        """Add the task's own options. Their names have to differ from those of all other tasks."""

    @abstractmethod
    def run(self, model: EvaluatedModel, context: EvaluationContext) -> R:
        """Evaluate the model. All ranks call this, and all return the same result.

        Raises:
            UserError: an option or the data cannot be used.
        """

    @abstractmethod
    def headline(self, result: R) -> Headline:
        """Return the score that a study compares."""

    @abstractmethod
    def table(self, result: R) -> RenderableType:
        """Return what the terminal shows."""

    def plot(self, result: R, folder: Path) -> None:
        """Write plots of the result to `folder`."""


TASKS: dict[str, EvaluationTask[Any]] = {}

TaskClass = TypeVar("TaskClass", bound=type[EvaluationTask[Any]])


def register_task(task: TaskClass) -> TaskClass:
    """Register a task class under its name."""
    assert task.name not in TASKS, f"two evaluation tasks are named {task.name}"
    TASKS[task.name] = task()
    return task


def add_integer(
    parser: argparse._ActionsContainer,
    option: str,
    least: int,
    default: int | list[int],
    help: str,
    metavar: str = "N",
    shown: str | None = None,
) -> None:
    """Add an option that takes an integer of at least `least`, or several of them if its default is a list.

    Args:
        shown: the default in the help text, if that is not its number.
    """

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise UserError(f"{option} {text} must be an integer of at least {least}") from error
        if value < least:
            raise UserError(f"{option} {value} must be at least {least}")
        return value

    shown = shown or (" ".join(map(str, default)) if isinstance(default, list) else str(default))
    nargs = "+" if isinstance(default, list) else None
    help = f"{help} (default: {shown})"
    parser.add_argument(option, type=parse, nargs=nargs, default=default, metavar=metavar, help=help)
