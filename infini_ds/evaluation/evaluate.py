"""Evaluate a model on tasks: run them, write evaluation.json, tables and plots."""

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from infini_ds.distributed import collectives
from infini_ds.evaluation.evaluation_file import Evaluation, start_evaluation, write_evaluation
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.task import TASKS, EvaluationContext
from infini_ds.utils.counts import short_count

logger = logging.getLogger(__name__)


def evaluate(
    model: EvaluatedModel, tasks: Sequence[str], context: EvaluationContext, folder: Path, command: str
) -> Evaluation:
    """Run the tasks, and write evaluation.json after each one and the plots at the end.

    All ranks call this. Rank 0 writes and logs.

    Args:
        tasks: names of registered tasks.
        folder: of the results. Results of other tasks stay in its evaluation.json if they are of the same model.
        command: that evaluation.json names.
    Raises:
        UserError: an option or the data of a task cannot be used, or the folder cannot be written.
    """
    evaluation = collectives.broadcast_from_rank_zero(
        lambda: start_evaluation(folder, model.facts, command, context.seed)
    )
    for name in tasks:
        task = TASKS[name]
        result = task.run(model, context)
        evaluation = evaluation.with_result(name, result)
        if collectives.is_rank_zero():
            write_evaluation(folder, evaluation)
            task.plot(result, folder)
            headline = task.headline(result)
            logger.info(f"{name}: {headline.name} {headline.value:.4f}")
    return evaluation


def show_evaluation(evaluation: Evaluation, tasks: Sequence[str], console: Console) -> None:
    """Print the model's facts and the tables of some tasks."""
    model = evaluation.model
    facts = f"{model.model_type}, {short_count(model.parameters)} parameters, sha256 {model.sha256[:12]}"
    console.print(f"\n{model.path}: {facts}", highlight=False)
    for name in tasks:
        console.print(TASKS[name].table(evaluation.result(name)))
