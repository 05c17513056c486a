"""A sequence group without other ranks: what a rank computes with it has the shapes and the memory of a real one."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from infini_ds.model import InfiniGPTNeoConfig, SequenceGroup
from infini_ds.model.memory import memory_dtype
from infini_ds.model.memory_rule import get_memory_rule


@dataclass(frozen=True)
class FakeGroup(SequenceGroup):
    """The first of `size` ranks, whose exchanges allocate what real ones do and leave it without contents.

    Attributes:
        contributions: bytes that this rank gave to each all-gather.
    """

    contributions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, ranks: int) -> "FakeGroup":
        return cls(process_group=None, rank=0, size=ranks)

    def all_gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([x.reshape(-1) for x in tensors])
        self.contributions.append(flat.nbytes)
        parts = _Gather.apply(flat, self.size).split([x.numel() for x in tensors], dim=1)
        return tuple(part.view(self.size, *x.shape) for part, x in zip(parts, tensors, strict=True))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine: Tensor, ranks: int) -> Tensor:
        return mine.new_empty(ranks * len(mine)).view(ranks, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradients: Tensor) -> tuple[Tensor, None]:
        return gradients.new_empty(gradients.shape[1]), None


def layer_contributions(config: InfiniGPTNeoConfig, rows: int, ranks: int) -> tuple[int, ...]:
    """Return the bytes that a rank gives to each all-gather of a layer's forward pass over a block.

    They depend neither on the length of a segment nor on how many a rank has, so one of one token stands for all.
    """
    rule, group = get_memory_rule(config.memory_rule), FakeGroup.of(ranks)
    B, H, D, dtype = rows, config.num_heads, config.head_dim, memory_dtype(torch.float32)
    with torch.device("meta"):
        state = rule.empty_state(B, H, D, dtype, "meta")
        k = torch.empty(B, 1, H, 1, D)
        parameters = {name: torch.empty_like(x) for name, x in rule.parameters(config).items()}
        rule.write_divided(state, k, k, None, None, parameters, group)
    return tuple(group.contributions)
