"""What a forward pass does with the arguments that transformers, its Trainer, PEFT and TRL pass to every model.

Shapes: B batch, T tokens, E width.
"""

from typing import Any

import torch
from torch import Tensor

IGNORED = ("cache_position", "next_sequence_length", "is_first_iteration", "logits_to_keep")  # of generation loops
# Of collators that pack documents into a row, such as TRL's: the borders that `position_ids` give too.
BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def reject_unknown_arguments(arguments: dict, *documents: Tensor | None) -> None:
    """Raise a TypeError for a misspelled argument, or one that requests what this model does not provide.

    Args:
        documents: the arguments that tell where packed documents begin; one of them is needed beside BORDERS.
    """
    for name, value in arguments.items():
        if name in IGNORED or value is None or value is False:
            continue
        if name not in BORDERS:
            raise TypeError(f"forward() of Infini-GPT-Neo has no argument {name}={value!r:.80}")
        if all(each is None for each in documents):
            raise TypeError(
                f"{name} is ignored by this model, which learns from position_ids or document_ids where packed "
                "documents begin: pass one of them too"
            )


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache, whichever of the two names it was passed by.

    Raises:
        ValueError: two different caches.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument: pass one of them")
    return past_key_values if cache is None else cache


def reject_attentions(output_attentions: bool | None, config: object) -> None:
    """Raise a ValueError if attention probabilities are requested by argument or configuration."""
    if output_attentions or (output_attentions is None and getattr(config, "output_attentions", False)):
        raise ValueError(
            "output_attentions=True is not possible: local attention is computed in one fused operation that never has "
            "its probabilities, and what a token reads from the memory is no weighting of earlier tokens; use "
            "output_hidden_states=True, or compare with use_memory=False"
        )


def one_of_ids_and_embeds(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return the token ids (B, T), or zeros in their place if embeddings are given.

    Raises:
        ValueError: both or neither are given, or the shape is not one of a batch of rows.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids (B, T) or inputs_embeds (B, T, E), and not both")
    if input_ids is not None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids of shape {tuple(input_ids.shape)} must be (rows, tokens): add a dimension")
        return input_ids
    assert inputs_embeds is not None
    if inputs_embeds.ndim != 3:
        raise ValueError(f"inputs_embeds of shape {tuple(inputs_embeds.shape)} must be (rows, tokens, width)")
    return torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)


def check_token_types(token_type_ids: Tensor | None) -> None:
    """Raise a ValueError unless all token types are 0: tokenizers of several model families return such."""
    if token_type_ids is not None and bool(token_type_ids.any()):
        raise ValueError(
            "token_type_ids other than 0 have no meaning for this model, which has no embedding of token types: leave "
            "token_type_ids away, and separate two texts by a token"
        )


def checked_mask(attention_mask: Tensor | None, tokens: Tensor, past_columns: int | None) -> Tensor | None:
    """Return the mask (B, T) of the tokens (B, T) of this call.

    Args:
        attention_mask: (B, T), or with a cache (B, columns since the start).
        past_columns: columns in the cache; None without a cache.
    Raises:
        ValueError: the mask has another shape.
    """
    if attention_mask is None:
        return None
    B, T = tokens.shape
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} is not possible: this model computes its own "
            "causal mask in each segment; give (rows, tokens) with 0 for padding, and document_ids for packed documents"
        )
    width = attention_mask.shape[1]
    if attention_mask.shape[0] != B or (width != T if past_columns is None else width < T):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit tokens of shape {(B, T)}"
            + ("" if past_columns is None else f" after {past_columns} columns in the cache")
        )
    return attention_mask[:, -T:] if T else attention_mask[:, :0]


def documents_of_positions(
    position_ids: Tensor, tokens: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, past: int | None
) -> Tensor | None:
    """Return the `document_ids` that `position_ids` imply: a position of 0 begins a document, as in TRL's packing.

    The positions themselves are ignored: the model counts its own from the start of each segment. So only those are
    accepted that count tokens: from 0 on in each document, and after a cache from any number above 0 on.

    Args:
        position_ids: (B, T) or (1, T); those of padding are ignored.
        tokens: (B, T); attention_mask: (B, T) of these tokens; past: columns in the cache, None without one.
    Raises:
        ValueError: the positions are others.
    """
    if position_ids.ndim != 2 or position_ids.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} do not fit tokens of shape {tuple(tokens.shape)}"
        )
    if not tokens.shape[1]:
        return document_ids
    positions = position_ids.expand(tokens.shape).long()
    valid = torch.ones_like(positions).bool() if attention_mask is None else attention_mask.bool()
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    latest = columns.where(valid, -1).cummax(1).values  # the last valid column up to each one
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
    previous = positions.gather(1, before.clamp_min(0))
    begins, first = valid & (positions == 0), before < 0
    consecutive = positions == previous + 1
    if past:
        fits = torch.where(first, positions > 0, consecutive)
        restarts = begins.any()
    else:
        fits = begins | (positions == columns) | (consecutive & ~first)  # padding may be counted, as torch.arange does
        restarts = (begins & ~first).any()
    if not bool((fits | ~valid).all()):
        raise ValueError(
            "position_ids are not those of this model, which counts positions from the start of each segment: leave "
            "position_ids away, or let them count from 0 in each document"
            + (" (a new document after a cache needs document_ids)" if past else "")
        )
    if document_ids is not None or past or not bool(restarts):
        return document_ids
    return (begins & ~first).cumsum(1)
