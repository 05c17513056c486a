"""The softmax rule: the linear rule with features that are a softmax of the scaled keys and queries.

ELU(x) + 1 is nearly the same for all x at the start of training, so that every query retrieves about the mean of all
values; and with it a token can hardly keep out of the sums. A softmax with a scale above 1 is sharp from the start, and
its features compete: text that puts its weight on features that no fact uses takes nothing from the facts, however long
it is. docs/recall.md has the measurements. Spiky softmax features are those of Hedgehog (Zhang et al. 2024,
arXiv:2402.04347).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .linear_rule import LinearRule
from .memory import memory_dtype
from .memory_rule import register_memory_rule

if TYPE_CHECKING:
    from .configuration import InfiniGPTNeoConfig

INITIAL_SCALE = 4.0
SMALLEST_FEATURE = 2.0**-57  # phi(q) z stays above 1e-20 where anything was written, and so does its gradient


class SoftmaxRule(LinearRule):
    """phi(x) = softmax(s x) with a learned scale s = exp(`log_scale`) of each head, otherwise the linear rule."""

    name = "softmax"

    def parameters(self, config: InfiniGPTNeoConfig) -> dict[str, nn.Parameter]:
        return {"log_scale": initial_log_scale(config)}

    def features(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return scaled_softmax(x, parameters["log_scale"]) + SMALLEST_FEATURE


def initial_log_scale(config: InfiniGPTNeoConfig) -> nn.Parameter:
    """Return log s of each head, (H,), of a new model."""
    return nn.Parameter(torch.full((config.num_heads,), math.log(INITIAL_SCALE)))


def scaled_softmax(x: Tensor, log_scale: Tensor) -> Tensor:
    """Return softmax(s x) over the channels, in fp32 or higher; x: (B, N, H, S, D), log_scale: (H,)."""
    x = x.to(memory_dtype(x.dtype))
    return (log_scale.to(x.dtype).exp()[:, None, None] * x).softmax(-1)


register_memory_rule(SoftmaxRule())
