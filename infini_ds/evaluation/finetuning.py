"""A language model gets a head for classification and is fine-tuned, as the BabyLM pipeline of 2023 does it.

That is `transformers.Trainer` with its defaults (AdamW without weight decay, a learning rate that falls to 0 in a
straight line, gradients clipped at 1) and early stopping: finetune_classification.py and finetune_model.sh of
github.com/babylm/evaluation-pipeline-2023. It is a loop of its own here: what is reported is the best evaluation during
training, for which no weights need to be kept, and a batch is computed in parts that leave the result as it is.

Shapes: B rows, T tokens in a row, C classes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from infini_ds.evaluation.scoring import batches_by_length
from infini_ds.utils.errors import UserError
from infini_ds.utils.progress import ProgressBar

IMPROVEMENT = 0.001  # less than that over the best so far uses up patience; the pipeline's early_stopping_threshold
MAX_NORM = 1.0  # of the gradient; the Trainer's default


@dataclass(frozen=True)
class FineTuning:
    """How each task is fine-tuned; the defaults are the pipeline's.

    batch: rows a step. patience: evaluations without improvement before training ends. evaluate_every: steps.
    max_length: tokens of a text or a pair of texts, which is cut there.
    """

    learning_rate: float = 5e-5
    batch: int = 64
    epochs: int = 10
    patience: int = 10
    evaluate_every: int = 200
    max_length: int = 128

    def check(self) -> None:
        """
        Raises:
            UserError: a value is outside of what its field allows.
        """
        for name, least in (("batch", 1), ("epochs", 1), ("patience", 1), ("evaluate_every", 1), ("max_length", 8)):
            if getattr(self, name) < least:
                raise UserError(f"--finetune {name}={getattr(self, name)} must be at least {least}")
        if self.learning_rate <= 0:
            raise UserError(f"--finetune learning_rate={self.learning_rate} must be above 0")


def settings_of(overrides: list[str]) -> FineTuning:
    """The defaults with `key=value` overrides.

    Raises:
        UserError: a key or a value that there is not.
    """
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(FineTuning, OmegaConf.from_dotlist(overrides)))
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        keys = ", ".join(field.name for field in fields(FineTuning))
        raise UserError(f"--finetune {' '.join(overrides)}: {reason}; its keys are {keys}") from error
    settings.check()
    return settings


@dataclass(frozen=True)
class Examples:
    """rows: B lists of tokens. labels: (B,) from 0 to C - 1."""

    rows: list[list[int]]
    labels: Tensor


def classifier_of(model: PreTrainedModel, classes: int) -> PreTrainedModel:
    """A model with a copy of the body of `model`, on the same device, and a new head.

    Raises:
        UserError: transformers knows no such head for this kind of model.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    if config.pad_token_id is None:  # by which most models find the last token; no text ends with these
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
) -> dict[str, float]:
    """Fine-tune in place; returns the figures of the best evaluation on the way, and the `step` they were found at.

    The best is by F1 of two classes and by accuracy of more. As in the pipeline there is an evaluation every so many
    steps, and after the last step only where there was none before.

    Args:
        seed: of the order of rows.
        batch_tokens: computed at a time, padding included; the result does not depend on it but for rounding.
    """
    classes = classifier.config.num_labels
    optimizer = torch.optim.AdamW(classifier.parameters(), settings.learning_rate, weight_decay=0.0)
    total = steps_of(len(train.rows), settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    decides = "f1" if classes == 2 else "accuracy"
    best, waited = None, 0
    for step, batch in enumerate(epochs_of_batches(len(train.rows), settings, seed), start=1):
        loss = train_step(classifier, train, batch, batch_tokens)
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % settings.evaluate_every == 0 or (step == total and best is None):
            figures = metrics(predict(classifier, validation.rows, batch_tokens), validation.labels, classes)
            waited = 0 if best is None or figures[decides] > best[decides] + IMPROVEMENT else waited + 1
            if best is None or figures[decides] > best[decides]:
                best = figures | {"step": step}
        shown = {"loss": f"{loss:.4f}"} | ({} if best is None else {f"best {decides}": f"{best[decides]:.4f}"})
        progress.advance(shown)
        if waited == settings.patience:
            break
    return best


def steps_of(rows: int, settings: FineTuning) -> int:
    return settings.epochs * -(-rows // settings.batch)


def epochs_of_batches(rows: int, settings: FineTuning, seed: int) -> Iterator[list[int]]:
    """Numbers of the rows of each step, every epoch in an order of its own; an epoch's last batch may be smaller."""
    order = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for batch in torch.randperm(rows, generator=order).split(settings.batch):
            yield batch.tolist()


def train_step(classifier: PreTrainedModel, train: Examples, batch: list[int], batch_tokens: int) -> float:
    """Adds the gradient of the mean loss over the batch, in parts of up to `batch_tokens`; returns that loss."""
    classifier.train()
    loss = 0.0
    for part in batches_by_length([len(train.rows[i]) for i in batch], batch_tokens):
        chosen = [batch[i] for i in part]
        logits = logits_of(classifier, [train.rows[i] for i in chosen])
        goal = train.labels[chosen].to(logits.device)
        part_loss = F.cross_entropy(logits, goal, reduction="sum") / len(batch)
        part_loss.backward()
        loss += part_loss.item()
    return loss


@torch.no_grad()
def predict(classifier: PreTrainedModel, rows: list[list[int]], batch_tokens: int) -> Tensor:
    """(B,) the likeliest class of each row."""
    classifier.eval()
    predictions = torch.zeros(len(rows), dtype=torch.long)
    for part in batches_by_length([len(row) for row in rows], batch_tokens):
        predictions[part] = logits_of(classifier, [rows[i] for i in part]).argmax(-1).cpu()
    return predictions


def logits_of(classifier: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """(B, C) in fp32. Rows are padded at their ends."""
    ids = [torch.tensor(row) for row in rows]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=classifier.config.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    device = classifier.device
    return classifier(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits.float()


def metrics(predictions: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Accuracy; of two classes also F1 of class 1 and Matthews' correlation, both 0 where they are not defined."""
    figures = {"accuracy": (predictions == labels).double().mean().item()}
    if classes == 2:
        yes, true = predictions == 1, labels == 1
        tp, fp, fn, tn = ((a & b).sum().item() for a, b in ((yes, true), (yes, ~true), (~yes, true), (~yes, ~true)))
        spread = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
        figures["f1"] = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
        figures["mcc"] = (tp * tn - fp * fn) / spread if spread else 0.0
    return figures
