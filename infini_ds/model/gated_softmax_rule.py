"""The gated softmax rule: the softmax rule with a learned strength of each write.

A softmax adds 1 to the sum of z whatever the token is. What a text leaves on the features of a fact is little for each
token, and it adds up: after 2,048 segments it covers what was clear after 16. With a strength of its own, a token that
says nothing of use stays out of all features. docs/recall.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .memory_rule import register_memory_rule
from .softmax_rule import SoftmaxRule

if TYPE_CHECKING:
    from .configuration import InfiniGPTNeoConfig

SMALLEST_STRENGTH = 2.0**-40  # phi(q) z stays above 1e-30, also of a text that is all noise; too little to add up


class GatedSoftmaxRule(SoftmaxRule):
    """Token t writes g_t phi(k_t), g_t = sigmoid(w k_t + c), to M and to z; w and c are learned, of each head.

    They start at 0, with g = 1/2 for all tokens, which is the softmax rule.
    """

    name = "gated_softmax"

    def parameters(self, config: InfiniGPTNeoConfig) -> dict[str, nn.Parameter]:
        H, D = config.num_heads, config.head_dim
        strength = {"strength": torch.zeros(H, D), "strength_bias": torch.zeros(H)}  # w and c
        return super().parameters(config) | {name: nn.Parameter(start) for name, start in strength.items()}

    def key_features(self, k: Tensor, write_mask: Tensor | None, parameters: Mapping[str, Tensor]) -> Tensor:
        phi_k = super().key_features(k, write_mask, parameters)
        w, c = (parameters[name].to(phi_k.dtype) for name in ("strength", "strength_bias"))
        g = torch.sigmoid(k.to(phi_k.dtype) @ w[:, :, None] + c[:, None, None])  # (B, N, H, S, 1)
        return phi_k * (g + SMALLEST_STRENGTH)

    def flops_per_token(self, config: InfiniGPTNeoConfig) -> float:
        return super().flops_per_token(config) + config.hidden_size


register_memory_rule(GatedSoftmaxRule())
