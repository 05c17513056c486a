"""GLUE and SuperGLUE: how well the model can be fine-tuned for tasks of understanding.

Tasks and metrics are those of the BabyLM pipeline of 2023, github.com/babylm/evaluation-pipeline-2023.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace

import torch

from infini_ds.distributed import collectives
from infini_ds.evaluation.finetuning import FineTuning, classifier_of, finetune, metrics, steps_of
from infini_ds.evaluation.glue_texts import Texts, load, sha256_of, thinned, tokenized
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.result_cache import ResultCache
from infini_ds.evaluation.scoring import context_length
from infini_ds.utils.errors import UserError
from infini_ds.utils.progress import ProgressBar
from infini_ds.utils.rng import seed_everything

GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True)
class Task:
    """hub: the dataset's name there. metric: what is reported. validation: its split."""

    hub: str = ""
    metric: str = "accuracy"
    validation: str = "validation"


TASKS = {
    "boolq": Task(SUPER_GLUE),
    "cola": Task(GLUE),
    "mnli": Task(GLUE, validation="validation_matched"),
    "mrpc": Task(GLUE, metric="f1"),
    "multirc": Task(SUPER_GLUE),
    "qnli": Task(GLUE),
    "qqp": Task(GLUE, metric="f1"),
    "rte": Task(GLUE),
    "sst2": Task(GLUE),
    "wsc": Task(SUPER_GLUE),
}


def measure(
    subject: EvaluatedModel,
    data: str,
    names: list[str],
    settings: FineTuning,
    seed: int,
    limit: int | None,
    session: ResultCache,
) -> dict:
    """Fine-tune the model for each task anew; each rank takes tasks of its own.

    Args:
        data: a folder of JSON lines, or "hub"; see `glue_texts.load`.
        names: of `TASKS`, or of others that the folder has files of.
        limit: examples of each split, taken evenly from it; None: all.

    Raises:
        UserError: a task's data are missing or broken, or the model cannot be fine-tuned.
    """
    splits = {}
    for name in names:
        task = TASKS.get(name, Task())
        splits[name] = [thinned(load(data, task.hub, name, split), limit) for split in ("train", task.validation)]
    most = context_length(subject.model) or settings.max_length
    settings = replace(settings, max_length=min(settings.max_length, most))
    shared = {"settings": asdict(settings), "seed": seed}
    sums = {name: sha256_of(*splits[name]) for name in names}

    def compute(part: str) -> dict:
        name = part.removeprefix("glue/")
        return fine_tuned(subject, name, *splits[name], settings, seed, session.batch_tokens)

    # The largest first, so that tasks that run at the same time are of like size.
    by_size = sorted(names, key=lambda name: -len(splits[name][0].texts))
    results = session.parts({f"glue/{name}": shared | {"data": sums[name]} for name in by_size}, compute)
    tasks = {name: results[f"glue/{name}"] for name in names}
    return {
        "mean": sum(task["value"] for task in tasks.values()) / len(tasks),
        "tasks": tasks,
        **shared,
        "limit": limit,
        "data": {"path": data, "sha256": hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()},
    }


def fine_tuned(
    subject: EvaluatedModel,
    name: str,
    train: Texts,
    validation: Texts,
    settings: FineTuning,
    seed: int,
    batch_tokens: int,
) -> dict:
    """What is reported of one task; `majority` is its value if every answer is the commonest label of training."""
    classes = sorted(set(train.labels))
    if len(classes) < 2 or not set(validation.labels) <= set(classes):
        raise UserError(
            f"--glue: {name} has the labels {classes} in training and {sorted(set(validation.labels))} in validation, "
            "where a task has two or more, the same in both; raise the limit, or mend the files"
        )
    examples = [tokenized(split, classes, subject.tokenizer, settings.max_length) for split in (train, validation)]
    seed_everything(seed)  # of the head's weights, and of dropout
    classifier = classifier_of(subject.model, len(classes))
    metric = TASKS.get(name, Task()).metric
    with ProgressBar(name, steps_of(len(train.texts), settings), shown=collectives.is_rank_zero()) as progress:
        best = finetune(classifier, *examples, settings, seed, batch_tokens, progress)
    labels = examples[1].labels
    majority = metrics(torch.full_like(labels, examples[0].labels.mode().values), labels, len(classes))
    sizes = {"train": len(train.texts), "validation": len(validation.texts), "classes": len(classes)}
    return {"metric": metric, "value": best[metric], **best, "majority": majority[metric], **sizes}
