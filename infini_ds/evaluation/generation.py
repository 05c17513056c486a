"""Inputs for `generate()`, and long texts that are read in bounded memory.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infini_ds.model import InfiniCache, InfiniGPTNeoForCausalLM

PIECE_TOKENS = 16_384  # of all rows together that are read at once


def prompt_inputs(
    tokenizer: PreTrainedTokenizerBase, model: InfiniGPTNeoForCausalLM, text: str, begins: bool = True
) -> dict[str, Any]:
    """Return `input_ids` and `attention_mask`, both (1, T), of a prompt.

    Args:
        begins: the prompt begins a document. The start token is then added, because every document in training begins
            with it.
    """
    start = [model.config.bos_token_id] if begins and model.config.bos_token_id is not None else []
    ids = start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    input_ids = torch.tensor([ids], dtype=torch.long, device=model.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@torch.no_grad()
def read_into_cache(
    model: InfiniGPTNeoForCausalLM,
    input_ids: Tensor,
    cache: InfiniCache | None = None,
    use_memory: bool = True,
    after_piece: Callable[[int], None] = lambda tokens: None,
) -> InfiniCache:
    """Read tokens (B, T) into a new cache, or after those that a cache holds, in bounded memory. Returns the cache.

    Args:
        after_piece: is called with the number of columns that were read.
    """
    S = model.config.segment_length
    size = max(1, PIECE_TOKENS // (len(input_ids) * S)) * S
    for piece in input_ids.split(size, dim=1):
        output = model.transformer(piece, past_key_values=cache, use_cache=True, use_memory=use_memory)
        cache = output.past_key_values
        after_piece(piece.shape[1])
    assert cache is not None  # there was a token
    return cache
