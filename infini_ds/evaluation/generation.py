"""Prompts for `generate()`."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infini_ds.model import InfiniGPTNeoForCausalLM


def prompt_ids(tokenizer: PreTrainedTokenizerBase, model: InfiniGPTNeoForCausalLM, text: str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (1, T) of a prompt that begins a document, as all documents in training do."""
    start = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    ids = start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    input_ids = torch.tensor([ids], device=model.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
