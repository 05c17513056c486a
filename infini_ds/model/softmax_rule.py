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
from .memory_rule import register_memory_rule

if TYPE_CHECKING:
    from .configuration import InfiniGPTNeoConfig

INITIAL_SCALE = 4.0
SMALLEST_FEATURE = 2.0**-57  # phi(q) z stays above 1e-20 where anything was written, and so does its gradient


class SoftmaxRule(LinearRule):
    """phi(x) = softmax(s x) with a learned scale s = exp(`log_scale`) of each head, otherwise the linear rule."""

    name = "softmax"

    def parameters(self, config: InfiniGPTNeoConfig) -> dict[str, nn.Parameter]:
        return {"log_scale": nn.Parameter(torch.full((config.num_heads,), math.log(INITIAL_SCALE)))}

    def features(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        scale = parameters["log_scale"].to(x.dtype).exp()[:, None, None]  # (H, 1, 1)
        return (scale * x).softmax(-1) + SMALLEST_FEATURE


register_memory_rule(SoftmaxRule())
