"""Floating-point operations of training, from the model's configuration."""

from infini_ds.model import InfiniGPTNeoConfig
from infini_ds.model.memory_rule import get_memory_rule


def training_flops_per_token(config: InfiniGPTNeoConfig) -> float:
    """Return the operations of one token's forward and backward pass. Recomputation is not counted, as in the MFU of
    PaLM (Chowdhery et al. 2022, appendix B).

    Each multiply-add is two operations, and the backward pass has twice those of the forward pass. Counted are the
    matrices of all layers and the output layer; local attention, over half a segment on average; the
    convolutions; and what the memory rule says of its write and read.
    """
    E, S = config.hidden_size, config.segment_length
    inner = config.intermediate_size or 4 * E
    matrices = config.num_layers * (4 * E * E + 2 * E * inner) + E * config.vocab_size
    windows = [config.window_size if kind == "local" else S for kind in config.attention_layers]
    attention = sum(2 * E * min(S, 2 * window) / 2 for window in windows)
    memory = config.num_layers * get_memory_rule(config.memory_rule).flops_per_token(config)
    convolution = E * (config.num_layers * 2 * config.short_conv + config.embed_conv)  # of keys and values; embeddings
    return 6.0 * (matrices + attention + memory + convolution)
