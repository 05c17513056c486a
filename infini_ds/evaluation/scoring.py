"""Per-token scores with the memory on, off or swapped; models without a memory are scored as they are.

Shapes: B rows, T tokens in a row, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infini_ds.data.batches import Batch, ModelInputs, pad_documents
from infini_ds.evaluation.model_loading import has_memory
from infini_ds.model import InfiniCache
from infini_ds.model.loss import IGNORE_INDEX
from infini_ds.training.recall import Span, grade_answers, likeliest_tokens

MEMORY_SETTINGS = ("on", "off", "other")  # the memory as it is, switched off, and that of another document
MAX_LOGITS = 2**27  # that exist at a time in models that return all of them: 512 MiB in fp32
DEFAULT_SEGMENT = 128  # tokens in a segment, for models that have none


def memory_settings(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the settings of the memory in which a model can be evaluated."""
    return MEMORY_SETTINGS if has_memory(model) else MEMORY_SETTINGS[:1]


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens the model can read, or None for any number."""
    return None if has_memory(model) else getattr(model.config, "max_position_embeddings", None)


def segment_length(model: PreTrainedModel) -> int:
    """Return the tokens in a segment of the model, or what counts as one for a model without segments."""
    return model.config.segment_length if has_memory(model) else DEFAULT_SEGMENT


@torch.no_grad()
def token_losses(model: PreTrainedModel, batch: Batch, memory: str = "on", other: Batch | None = None) -> Tensor:
    """Return -log p of each token after the first, (B, T - 1) on the model's device; 0 where the label is ignored.

    Args:
        batch: padded at the end.
        memory: one of MEMORY_SETTINGS. With "other", each row reads the memory that the same row of `other`, a batch of
            the same shape, has before the same segment.
    """
    if not has_memory(model):
        return _losses_in_windows(model, batch)
    inputs, options = _with_other(model, batch, memory, other)
    output = model(**inputs, **options, loss_reduction="none", return_logits=False)
    return output.loss[: len(batch)]


def _with_other(
    model: PreTrainedModel, batch: Batch, memory: str, other: Batch | None
) -> tuple[ModelInputs, dict[str, Any]]:
    """Return the model's arguments for `batch`, followed by the rows of `other` if their memory is read."""
    options: dict[str, Any] = {"use_memory": memory != "off"}
    if memory == "other":
        assert other is not None
        B = len(batch)
        batch = batch + other
        options["memory_of"] = torch.arange(B, 2 * B, device=model.device).repeat(2)
    (inputs,) = batch.micro_batches(len(batch), model.device)
    return inputs, options


def _losses_in_windows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the losses of a model without a memory. It reads each document by itself, in windows of its context."""
    ids, labels = batch.input_ids.to(model.device), batch.labels.to(model.device)
    windows = _windows(batch, context_length(model))
    losses = torch.zeros(ids.shape[0], ids.shape[1] - 1, device=model.device)
    longest = max(end - begin for _, (begin, end) in windows)
    windows_at_once = max(1, MAX_LOGITS // (longest * model.config.vocab_size))
    for first in range(0, len(windows), windows_at_once):
        some = windows[first : first + windows_at_once]
        inputs = pad_documents([ids[row, begin:end].tolist() for row, (begin, end) in some])
        logits = model(
            input_ids=inputs.input_ids.to(model.device), attention_mask=inputs.full_attention_mask().to(model.device)
        ).logits.float()
        for (row, (begin, end)), window_logits in zip(some, logits, strict=True):
            targets = labels[row, begin + 1 : end + 1]  # includes the token after the window, if the row has one
            losses[row, begin : begin + len(targets)] = F.cross_entropy(
                window_logits[: len(targets)], targets, ignore_index=IGNORE_INDEX, reduction="none"
            )
    return losses


def _windows(batch: Batch, max_length: int | None) -> list[tuple[int, Span]]:
    """Return (row, span) of the windows of up to `max_length` tokens that each document is cut into."""
    windows = []
    for row, documents in enumerate(batch.document_spans()):
        for start, end in documents:
            step = max_length or end - start
            windows += [(row, (begin, min(begin + step, end))) for begin in range(start, end, step)]
    return windows


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    batch: Batch,
    answers: list[list[Span]],
    memory: str = "on",
    other: Batch | None = None,
    cache: InfiniCache | None = None,
) -> list[list[bool]]:
    """Return for each answer whether greedy decoding gives it.

    That is the case if each of its tokens is the likeliest one after the true tokens before it, which one forward pass
    tells. A model with a limited context reads the last tokens that fit.

    Args:
        batch, memory, other: as for `token_losses`.
        answers: where the answers of each row are.
        cache: of a model with a memory: what it has read before, for the rows of `batch` and then those of `other`. It
            is changed.
    """

    def predict(rows: Tensor, positions: Tensor) -> Tensor:
        if has_memory(model):
            inputs, options = _with_other(model, batch, memory, other)
            return likeliest_tokens(model, inputs, rows, positions, **options, past_key_values=cache)
        return _predictions_in_window(model, batch, answers)[rows, positions - 1]

    return grade_answers(batch.input_ids, answers, predict)


def _predictions_in_window(model: PreTrainedModel, batch: Batch, answers: list[list[Span]]) -> Tensor:
    """Return the likeliest next token at each position of the model's last window, (B, T) on the CPU."""
    ids, predicted = batch.input_ids, torch.full_like(batch.input_ids, IGNORE_INDEX)
    for row, spans in enumerate(answers):
        end = spans[-1][1] - 1  # the last token of the last answer is not read
        begin = max(0, end - (context_length(model) or end))
        logits = model(input_ids=ids[row : row + 1, begin:end].to(model.device)).logits
        predicted[row, begin:end] = logits[0].argmax(-1).cpu()
    return predicted
