"""What a model makes of a batch, under each setting of its memory; models without one take part as they are.

Shapes: B rows, T tokens in a row, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infini_ds.data.batches import Batch, ModelInputs, pad_documents
from infini_ds.evaluation.model_loading import has_memory
from infini_ds.model.loss import IGNORE_INDEX

SETTINGS = ("on", "off", "other")  # the memory as it is, switched off, and that of another document
LOGITS = 2**27  # numbers of logits at a time, of models that know no other way: 512 MiB in fp32


def settings(model: PreTrainedModel) -> tuple[str, ...]:
    return SETTINGS if has_memory(model) else SETTINGS[:1]


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that the model takes; None without a limit."""
    return None if has_memory(model) else getattr(model.config, "max_position_embeddings", None)


def batches_by_length(lengths: list[int], tokens: int) -> list[list[int]]:
    """Numbers of rows in batches of up to `tokens`, padding included, or of one row; rows of like length together."""
    batches: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * longest > tokens:
            batches.append([])
            longest = lengths[number]
        batches[-1].append(number)
    return batches


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, batch: Batch, memory: str = "on", other: Batch | None = None
) -> Tensor:
    """-log p of each token behind the first, (B, T - 1) on the model's device; 0 where the label does not count.

    Args:
        batch: as `infini_ds.data.batches.collate` makes it, padded at the end.
        memory: one of SETTINGS; with "other" each row reads the memory that the row of `other`, a batch alike, has
            before the same segment.
    """
    if not has_memory(model):
        return _losses_in_windows(model, batch)
    part, options = _with_other(model, batch, memory, other)
    output = model(**part, **options, loss_reduction="none", return_logits=False)
    return output.loss[: len(batch)]


def _with_other(
    model: PreTrainedModel, batch: Batch, memory: str, other: Batch | None
) -> tuple[ModelInputs, dict]:
    """Arguments of the model for `batch`, with the rows of `other` behind its own where they are needed."""
    options = {"use_memory": memory != "off"}
    if memory == "other":
        B = len(batch)
        batch = batch + other
        options["memory_of"] = torch.arange(B, 2 * B, device=model.device).repeat(2)
    (part,) = batch.micro_batches(len(batch), model.device)
    return part, options


def _losses_in_windows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Each document by itself, in windows of as many tokens as the model takes."""
    ids, labels = batch.input_ids.to(model.device), batch.labels.to(model.device)
    pieces = _windows(batch, context_length(model))
    losses = torch.zeros(ids.shape[0], ids.shape[1] - 1, device=model.device)
    longest = max(last - first for _, first, last in pieces)
    rows = max(1, LOGITS // (longest * model.config.vocab_size))
    for at in range(0, len(pieces), rows):
        some = pieces[at : at + rows]
        part = pad_documents([ids[row, first:last].tolist() for row, first, last in some])
        logits = model(
            input_ids=part.input_ids.to(model.device), attention_mask=part.full_attention_mask().to(model.device)
        ).logits.float()
        for (row, first, last), of_piece in zip(some, logits, strict=True):
            targets = labels[row, first + 1 : last + 1]  # the token behind the piece too, if there is one
            losses[row, first : first + len(targets)] = F.cross_entropy(
                of_piece[: len(targets)], targets, ignore_index=IGNORE_INDEX, reduction="none"
            )
    return losses


def _windows(batch: Batch, most: int | None) -> list[tuple[int, int, int]]:
    """(row, first, last) of every document's windows of up to `most` tokens."""
    pieces = []
    for row, spans in enumerate(batch.document_spans()):
        for start, end in spans:
            step = most or end - start
            pieces += [(row, first, min(first + step, end)) for first in range(start, end, step)]
    return pieces


@torch.no_grad()
def answered(
    model: PreTrainedModel,
    batch: Batch,
    answers: list[list[tuple[int, int]]],
    memory: str = "on",
    other: Batch | None = None,
) -> list[list[bool]]:
    """Whether each token of each answer is the likeliest one behind all before it, which is whether greedy decoding
    gives the answer. A model with a longest context sees the end of what comes before, as much as it takes.

    Args:
        batch, memory, other: as for `token_losses`; answers: of each row, where they stand: [begin, end).
    """
    places = [(row, at) for row, spans in enumerate(answers) for begin, end in spans for at in range(begin, end)]
    row, at = torch.tensor(places).unbind(1)
    if has_memory(model):
        part, options = _with_other(model, batch, memory, other)
        del part["labels"]
        hidden = model.transformer(**part, **options).last_hidden_state
        likeliest = model.lm_head(hidden[row, at - 1]).argmax(-1).cpu()
    else:
        likeliest = _likeliest_in_window(model, batch, answers)[row, at - 1]
    hits = (likeliest == batch.input_ids[row, at]).tolist()
    right = {place for place, hit in zip(places, hits, strict=True) if hit}
    return [[all((row, at) in right for at in range(*span)) for span in spans] for row, spans in enumerate(answers)]


def _likeliest_in_window(model: PreTrainedModel, batch: Batch, answers: list) -> Tensor:
    """(B, T) the likeliest token behind each one of the model's last window, on the CPU."""
    ids, likeliest = batch.input_ids, torch.full_like(batch.input_ids, IGNORE_INDEX)
    for row, spans in enumerate(answers):
        last = spans[-1][1] - 1
        first = max(0, last - (context_length(model) or last))
        logits = model(input_ids=ids[row : row + 1, first:last].to(model.device)).logits
        likeliest[row, first:last] = logits[0].argmax(-1).cpu()
    return likeliest
