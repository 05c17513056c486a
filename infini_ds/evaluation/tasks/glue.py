"""GLUE and SuperGLUE: how well the model can be fine-tuned for language understanding.

Tasks and metrics are those of the BabyLM pipeline of 2023, github.com/babylm/evaluation-pipeline-2023.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from infini_ds.distributed import collectives
from infini_ds.evaluation.finetuning import FineTuning, classifier_of, finetune, metrics, parse_settings, steps_of
from infini_ds.evaluation.glue_texts import HUB, Split, evenly_spaced, load_split, sha256_of_splits, tokenize
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.plots import MEMORY_COLORS, plt, save_figure
from infini_ds.evaluation.scoring import context_length
from infini_ds.evaluation.tables import new_table
from infini_ds.evaluation.task import (
    DataFacts,
    EvaluationContext,
    EvaluationTask,
    Headline,
    TaskResult,
    TidyRow,
    register_task,
)
from infini_ds.utils.errors import UserError
from infini_ds.utils.hashing import sha256_of_json
from infini_ds.utils.progress import ProgressBar
from infini_ds.utils.rng import seed_everything

GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True)
class GlueTask:
    """hub: name of the dataset. metric: the one that is reported. validation: name of the validation split."""

    hub: str = ""
    metric: str = "accuracy"
    validation: str = "validation"


GLUE_TASKS = {
    "boolq": GlueTask(SUPER_GLUE),
    "cola": GlueTask(GLUE),
    "mnli": GlueTask(GLUE, validation="validation_matched"),
    "mrpc": GlueTask(GLUE, metric="f1"),
    "multirc": GlueTask(SUPER_GLUE),
    "qnli": GlueTask(GLUE),
    "qqp": GlueTask(GLUE, metric="f1"),
    "rte": GlueTask(GLUE),
    "sst2": GlueTask(GLUE),
    "wsc": GlueTask(SUPER_GLUE),
}


@dataclass(frozen=True)
class GlueScore:
    """The best evaluation of one task.

    value: of `metric`. step: at which it was measured. majority: `value` of the majority baseline, which always answers
    with the most frequent label of the training split. train, validation: number of examples. f1, mcc: for two classes.
    """

    metric: str
    value: float
    accuracy: float
    step: int
    majority: float
    train: int
    validation: int
    classes: int
    f1: float | None = None
    mcc: float | None = None


@dataclass(frozen=True)
class GlueResult(TaskResult):
    """mean: of the tasks' values."""

    mean: float
    tasks: dict[str, GlueScore]
    settings: FineTuning
    seed: int
    limit: int | None
    data: DataFacts

    def tidy_rows(self) -> list[TidyRow]:
        tasks = [TidyRow("on", f"{score.metric}/{name}", score.value) for name, score in self.tasks.items()]
        return [TidyRow("on", "mean", self.mean), *tasks]


@register_task
class Glue(EvaluationTask[GlueResult]):
    name = "glue"
    help = "GLUE and SuperGLUE, fine-tuned as the BabyLM pipeline does; --limit: examples of a split"
    result_type = GlueResult

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        names = ", ".join(GLUE_TASKS)
        add = parser.add_argument
        add("--glue", type=os.path.expanduser, default=HUB, help="folder of JSON lines, or hub (default: %(default)s)")
        add("--glue-tasks", nargs="+", default=list(GLUE_TASKS), metavar="TASK", help=f"(default: {names})")
        add("--finetune", nargs="+", default=[], metavar="key=value", help="such as learning_rate=5e-5 epochs=10")

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> GlueResult:
        given = context.arguments
        return evaluate_glue(model, given.glue, given.glue_tasks, parse_settings(given.finetune), context)

    def headline(self, result: GlueResult) -> Headline:
        return Headline("mean", result.mean)

    def table(self, result: GlueResult) -> Table:
        table = new_table(
            "GLUE and SuperGLUE, fine-tuned", "task", "metric", "value", "majority baseline", "training examples"
        )
        for name, score in result.tasks.items():
            table.add_row(name, score.metric, f"{score.value:.3f}", f"{score.majority:.3f}", f"{score.train:,}")
        table.add_section()
        table.add_row("mean", "", f"{result.mean:.3f}")
        return table

    def plot(self, result: GlueResult, folder: Path) -> None:
        """Plot the value of each task as a bar, and the majority baseline as a tick on it."""
        names = list(reversed(result.tasks))
        scores = [result.tasks[name] for name in names]
        places = range(len(names))
        figure, axes = plt.subplots(figsize=(8, 1.6 + 0.36 * len(names)))
        axes.barh(places, [score.value for score in scores], color=MEMORY_COLORS["on"], alpha=0.5, height=0.7)
        baselines = [score.majority for score in scores]
        axes.plot(baselines, places, "|", color="0.2", markersize=14, label="majority baseline")
        for y, score in enumerate(scores):
            axes.text(1.01, y, f"{score.value:.2f}", va="center", fontsize=9)
        axes.set_yticks(places, [f"{name} ({score.metric})" for name, score in zip(names, scores, strict=True)])
        axes.set(xlim=(0, 1), xlabel="value on the validation split")
        axes.set_title(f"GLUE and SuperGLUE, fine-tuned: mean {result.mean:.3f}")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="lower right", fontsize=9)
        figure.tight_layout()
        save_figure(figure, folder / "glue.png")


def evaluate_glue(
    model: EvaluatedModel, data: str, names: Sequence[str], settings: FineTuning, context: EvaluationContext
) -> GlueResult:
    """Fine-tune the model for each task from scratch. Different ranks work on different tasks.

    Args:
        data: a folder of JSON lines, or "hub"; see `glue_texts.load_split`.
        names: keys of GLUE_TASKS, or other tasks that the folder has files of.
    Raises:
        UserError: the data of a task are missing or damaged, or the model cannot be fine-tuned.
    """
    splits: dict[str, tuple[Split, Split]] = {}
    for name in names:
        task = GLUE_TASKS.get(name, GlueTask())
        train, validation = (load_split(data, task.hub, name, split) for split in ("train", task.validation))
        splits[name] = evenly_spaced(train, context.limit), evenly_spaced(validation, context.limit)
    max_length = min(settings.max_length, context_length(model.model) or settings.max_length)
    settings = replace(settings, max_length=max_length)
    hashes = {name: sha256_of_splits(*splits[name]) for name in names}
    options = {"settings": asdict(settings), "seed": context.seed}

    def compute(part: str) -> GlueScore:
        name = part.removeprefix("glue/")
        return compute_score(model, name, *splits[name], settings, context.seed, context.batch_tokens)

    # The largest first, so that tasks that run at the same time are of similar size.
    by_size = sorted(names, key=lambda name: -len(splits[name][0].texts))
    parts = {f"glue/{name}": options | {"data": hashes[name]} for name in by_size}
    scores = context.cache.get_or_compute_all(parts, GlueScore, compute)
    tasks = {name: scores[f"glue/{name}"] for name in names}
    return GlueResult(
        mean=sum(score.value for score in tasks.values()) / len(tasks),
        tasks=tasks,
        settings=settings,
        seed=context.seed,
        limit=context.limit,
        data=DataFacts(data, sha256_of_json(hashes)),
    )


def compute_score(
    model: EvaluatedModel,
    name: str,
    train: Split,
    validation: Split,
    settings: FineTuning,
    seed: int,
    batch_tokens: int,
) -> GlueScore:
    """Fine-tune the model for one task and return its best evaluation.

    Raises:
        UserError: the labels are not those of a classification task.
    """
    classes = sorted(set(train.labels))
    if len(classes) < 2 or not set(validation.labels) <= set(classes):
        raise UserError(
            f"--glue: {name} has the labels {classes} in training and {sorted(set(validation.labels))} in validation, "
            "but a task needs two or more, the same in both: raise the limit, or fix the files"
        )
    train_examples, validation_examples = (
        tokenize(split, classes, model.tokenizer, settings.max_length) for split in (train, validation)
    )
    seed_everything(seed)  # for the weights of the head, and for dropout
    classifier = classifier_of(model.model, len(classes))
    metric = GLUE_TASKS.get(name, GlueTask()).metric
    with ProgressBar(name, steps_of(len(train.texts), settings), shown=collectives.is_rank_zero()) as progress:
        best = finetune(classifier, train_examples, validation_examples, settings, seed, batch_tokens, progress)
    labels = validation_examples.labels
    most_frequent = train_examples.labels.mode().values.item()
    majority = metrics(torch.full_like(labels, most_frequent), labels, len(classes))
    return GlueScore(
        metric=metric,
        value=best.metrics[metric],
        step=best.step,
        majority=majority[metric],
        train=len(train.texts),
        validation=len(validation.texts),
        classes=len(classes),
        **best.metrics,
    )
