"""Fine-tune a language model with a classification head, as the BabyLM pipeline of 2023 does.

That is `transformers.Trainer` with its defaults (AdamW without weight decay, a learning rate that decays linearly to 0,
gradients clipped at 1) and early stopping: finetune_classification.py and finetune_model.sh of
github.com/babylm/evaluation-pipeline-2023. This is a loop of its own because the best evaluation during training is
what is reported, so no weights have to be kept, and because a batch is computed in micro-batches of bounded size.

Shapes: B rows, T tokens in a row, C classes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from infini_ds.data.batches import batches_by_length
from infini_ds.utils.errors import UserError, first_line
from infini_ds.utils.progress import ProgressBar

MIN_IMPROVEMENT = 0.001  # that resets early stopping; the pipeline's early_stopping_threshold
MAX_GRADIENT_NORM = 1.0  # the Trainer's default


@dataclass(frozen=True)
class FineTuning:
    """How each task is fine-tuned. The defaults are the pipeline's.

    batch: rows a step. patience: evaluations without improvement before training ends. evaluate_every: steps.
    max_length: tokens of a text or a pair of texts, to which it is truncated.
    """

    learning_rate: float = 5e-5
    batch: int = 64
    epochs: int = 10
    patience: int = 10
    evaluate_every: int = 200
    max_length: int = 128

    def check(self) -> None:
        """Raise a UserError if a value is outside of its range."""
        for name, least in (("batch", 1), ("epochs", 1), ("patience", 1), ("evaluate_every", 1), ("max_length", 8)):
            if getattr(self, name) < least:
                raise UserError(f"--finetune {name}={getattr(self, name)} must be at least {least}")
        if not self.learning_rate > 0:  # written this way so that NaN is rejected too
            raise UserError(f"--finetune learning_rate={self.learning_rate} must be above 0")


def parse_settings(overrides: list[str]) -> FineTuning:
    """Return the defaults with `key=value` overrides.

    Raises:
        UserError: a key is unknown, or a value is not one of its type or range.
    """
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(FineTuning, OmegaConf.from_dotlist(overrides)))
    except OmegaConfBaseException as error:
        keys = ", ".join(field.name for field in fields(FineTuning))
        raise UserError(f"--finetune {' '.join(overrides)}: {first_line(error)}; its keys are {keys}") from error
    settings = cast(FineTuning, settings)
    settings.check()
    return settings


@dataclass(frozen=True)
class Examples:
    """rows: B lists of tokens. labels: (B,) from 0 to C - 1."""

    rows: list[list[int]]
    labels: Tensor


@dataclass(frozen=True)
class BestEvaluation:
    """metrics: as `metrics` returns them. step: after which they were measured."""

    metrics: dict[str, float]
    step: int


def classifier_of(model: PreTrainedModel, classes: int) -> PreTrainedModel:
    """Return a classifier with a copy of the model's body, on the same device, and a new head.

    Raises:
        UserError: transformers has no classification head for this type of model.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    if config.pad_token_id is None:  # most models find the last token by it; no text ends with one of these
        config.pad_token_id = config.eos_token_id if config.eos_token_id is not None else 0
    try:
        classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(
            f"transformers has no AutoModelForSequenceClassification of a {config.model_type}: leave the task glue out"
        ) from error
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    return classifier.to(device=model.device, dtype=model.dtype)


def finetune(
    classifier: PreTrainedModel,
    train: Examples,
    validation: Examples,
    settings: FineTuning,
    seed: int,
    batch_tokens: int,
    progress: ProgressBar,
) -> BestEvaluation:
    """Fine-tune in place and return the best evaluation during training.

    The best is by F1 with two classes, and by accuracy with more. As in the pipeline, evaluation runs every
    `evaluate_every` steps, and after the last step only if it has not run before.

    Args:
        seed: of the order of rows.
        batch_tokens: to compute at once, padding included. The result does not depend on it beyond rounding.
    """
    classes = classifier.config.num_labels
    optimizer = torch.optim.AdamW(classifier.parameters(), settings.learning_rate, weight_decay=0.0)
    total = steps_of(len(train.rows), settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    criterion = "f1" if classes == 2 else "accuracy"
    best: BestEvaluation | None = None
    evaluations_without_improvement = 0
    for step, batch in enumerate(batches_of_epochs(len(train.rows), settings, seed), start=1):
        loss = train_step(classifier, train, batch, batch_tokens)
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % settings.evaluate_every == 0 or (step == total and best is None):
            found = metrics(predict(classifier, validation.rows, batch_tokens), validation.labels, classes)
            improved = best is None or found[criterion] > best.metrics[criterion] + MIN_IMPROVEMENT
            evaluations_without_improvement = 0 if improved else evaluations_without_improvement + 1
            if best is None or found[criterion] > best.metrics[criterion]:
                best = BestEvaluation(found, step)
        shown = {"loss": f"{loss:.4f}"}
        if best is not None:
            shown[f"best {criterion}"] = f"{best.metrics[criterion]:.4f}"
        progress.advance(shown)
        if evaluations_without_improvement == settings.patience:
            break
    assert best is not None  # the last step evaluates if no other has
    return best


def steps_of(rows: int, settings: FineTuning) -> int:
    """Return the number of steps of all epochs."""
    return settings.epochs * -(-rows // settings.batch)


def batches_of_epochs(rows: int, settings: FineTuning, seed: int) -> Iterator[list[int]]:
    """Yield the rows of each step, every epoch in another order; the last batch of an epoch may be smaller."""
    order = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for batch in torch.randperm(rows, generator=order).split(settings.batch):
            yield batch.tolist()


def train_step(classifier: PreTrainedModel, train: Examples, batch: list[int], batch_tokens: int) -> float:
    """Accumulate the gradient of the batch's mean loss over micro-batches, and return that loss."""
    classifier.train()
    loss = 0.0
    for part in batches_by_length([len(train.rows[i]) for i in batch], batch_tokens):
        chosen = [batch[i] for i in part]
        logits = logits_of(classifier, [train.rows[i] for i in chosen])
        targets = train.labels[chosen].to(logits.device)
        part_loss = F.cross_entropy(logits, targets, reduction="sum") / len(batch)
        part_loss.backward()
        loss += part_loss.item()
    return loss


@torch.no_grad()
def predict(classifier: PreTrainedModel, rows: list[list[int]], batch_tokens: int) -> Tensor:
    """Return the likeliest class of each row, (B,) on the CPU."""
    classifier.eval()
    predictions = torch.zeros(len(rows), dtype=torch.long)
    for part in batches_by_length([len(row) for row in rows], batch_tokens):
        predictions[part] = logits_of(classifier, [rows[i] for i in part]).argmax(-1).cpu()
    return predictions


def logits_of(classifier: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """Return the logits, (B, C) in fp32, of rows that are padded at the end."""
    ids = [torch.tensor(row) for row in rows]
    padding = classifier.config.pad_token_id
    assert padding is not None  # `classifier_of` sets it
    input_ids = pad_sequence(ids, batch_first=True, padding_value=padding)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    device = classifier.device
    return classifier(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits.float()


def metrics(predictions: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Return the accuracy, and with two classes F1 of class 1 and Matthews' correlation, both 0 if undefined."""
    found = {"accuracy": (predictions == labels).double().mean().item()}
    if classes == 2:
        positive, actual = predictions == 1, labels == 1
        tp, fp, fn, tn = (
            int((a & b).sum())
            for a, b in ((positive, actual), (positive, ~actual), (~positive, actual), (~positive, ~actual))
        )
        spread = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
        found["f1"] = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
        found["mcc"] = (tp * tn - fp * fn) / spread if spread else 0.0
    return found
