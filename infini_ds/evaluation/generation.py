"""Inputs for `generate()`."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from infini_ds.model import InfiniGPTNeoForCausalLM


def prompt_inputs(tokenizer: PreTrainedTokenizerBase, model: InfiniGPTNeoForCausalLM, text: str) -> dict[str, Any]:
    """Return `input_ids` and `attention_mask`, both (1, T), of a prompt that begins a document.

    The start token is added because every document in training begins with it.
    """
    start = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    ids = start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    input_ids = torch.tensor([ids], device=model.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
