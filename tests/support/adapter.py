"""A low-rank adapter, which tests wrap linear layers in."""

import torch
import torch.nn.functional as F
from torch import nn


class Adapter(nn.Module):
    """A linear layer with an added product of two small matrices whose input has dropout, as in LoRA."""

    def __init__(self, base: nn.Linear, dropout: float):
        super().__init__()
        self.base, self.dropout = base.requires_grad_(False), nn.Dropout(dropout)
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(self.dropout(x), self.a), self.b)
