"""Sequence parallelism: the segments of each row divided over the ranks of a group.

Every rank of a group is called with the same complete rows. Of each block of K n segments, rank r computes segments r n
to (r + 1) n - 1, its span. Local attention needs no other rank. In each layer the ranks exchange what their spans write
to the memory, which has the same size however long a span is; from that each rank computes the memory before its span,
and the memory after the block.

A loss is computed by all ranks of the group alike: its value is that of the complete rows. Each rank's `backward` then
gives the weights the gradient of all K copies of the loss through this rank's segments. So the mean over the ranks, as
DDP and ZeRO take it, is the gradient of one rank that computes the complete rows.

Shapes: B batch, K ranks of the group, n segments of a span, N = K n segments of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .memory import StateT, like_state, prefix_sums


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks over which the segments of a row are divided.

    All of its ranks call the model equally often, with equal shapes, since each call exchanges tensors.

    Attributes:
        process_group: of `size` ranks in the order of their spans. None: all ranks of the default group.
        rank: which span this rank computes.
        size: number of ranks, K.
    """

    process_group: dist.ProcessGroup | None
    rank: int
    size: int

    def __deepcopy__(self, memo: dict) -> SequenceGroup:
        return self  # a process group cannot be copied, nor does a copy of the model need another one

    @torch.compiler.disable
    def all_gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of all ranks, (K, …) for each one of shape (…), in one exchange; all of one dtype.

        The gradient of a rank's tensor is summed over all ranks. So the result has to be used alike on all ranks: if
        one rank's loss did not depend on it, the others would wait for its gradient forever.
        """
        flat: Tensor = _AllGather.apply(torch.cat([x.reshape(-1) for x in tensors]), self)
        parts = flat.split([x.numel() for x in tensors], dim=1)
        return tuple(part.view(self.size, *x.shape) for part, x in zip(parts, tensors, strict=True))

    @torch.compiler.disable
    def scan(
        self, compose: Callable[[StateT, tuple[Tensor, ...]], StateT], state: StateT, span: tuple[Tensor, ...]
    ) -> tuple[StateT, StateT]:
        """Return the memory before this rank's span and after the block, in one exchange.

        Args:
            compose: (memory before a span, what the span does to it) -> memory after the span.
            state: before the block, the same on all ranks.
            span: what this rank's span does.
        """
        states = [state]
        for of_rank in zip(*self.all_gather(*span), strict=True):
            states.append(compose(states[-1], of_rank))
        # Stacked, so that the gathered tensors are used alike on all ranks.
        stacked = [torch.stack(tensors) for tensors in zip(*states, strict=True)]
        before, after = (like_state(state, [tensors[i] for tensors in stacked]) for i in (self.rank, self.size))
        return before, after

    @torch.compiler.disable
    def prefix_sums(
        self, initial: StateT, terms: StateT, memory_document: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], StateT]:
        """Return `memory.prefix_sums` of this rank's span for each tensor of a state, in one exchange.

        Args:
            initial: tensors (B, …), the sums before the block.
            terms: tensors (B, n, …), what each segment of this rank's span adds.
            memory_document: (B, N + 1) of the block.
        Returns:
            For each tensor the sums before each segment of the span, (B, n, …), and after the span, (B, …); and the
            sums after the block, (B, …).
        """
        own = self.of_span(memory_document)
        gathered = self.all_gather(*(_sum_of_last_document(x, own) for x in terms))
        ends = self._ends_of_spans(memory_document)
        sums, after = [], []
        for x, new, spans in zip(initial, terms, gathered, strict=True):
            of_spans, last = prefix_sums(x, spans.transpose(0, 1), ends)
            sums.append(prefix_sums(of_spans[:, self.rank], new, own))
            after.append(last)
        return sums, like_state(initial, after)

    def of_span(self, memory_document: Tensor | None) -> Tensor | None:
        """Return the part of a block's memory_document (B, N + 1) that belongs to this rank's span, (B, n + 1)."""
        if memory_document is None:
            return None
        n = (memory_document.shape[1] - 1) // self.size
        return memory_document[:, self.rank * n : (self.rank + 1) * n + 1]

    def _ends_of_spans(self, memory_document: Tensor | None) -> Tensor | None:
        """Return the documents before each span and after the last one, (B, K + 1)."""
        if memory_document is None:
            return None
        return memory_document[:, :: (memory_document.shape[1] - 1) // self.size]

    def join(self, values: Tensor, lengths: list[int]) -> Tensor:
        """Return values of the complete rows, (B, K L, …), from those of this rank's spans in all blocks, (B, L, …).

        `lengths`: of the span in each block, which add up to L.
        """
        (gathered,) = self.all_gather(values)  # (K, B, L, …)
        blocks = gathered.split(lengths, dim=2)
        return torch.cat([block.transpose(0, 1).flatten(1, 2) for block in blocks], dim=1)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        return self.all_gather(values)[0].sum(0)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine: Tensor, group: SequenceGroup) -> Tensor:
        """(n,) -> (K, n)"""
        ctx.group = group
        gathered = mine.new_empty(group.size * len(mine))
        dist.all_gather_into_tensor(gathered, mine, group=group.process_group)
        return gathered.view(group.size, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients.new_empty(gradients.shape[1])
        # torch 2.13 gives reduce_scatter_tensor another name, and warns of the old one.
        reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        reduce_scatter(summed, gradients.reshape(-1), group=ctx.group.process_group)
        return summed, None


def _sum_of_last_document(terms: Tensor, memory_document: Tensor | None) -> Tensor:
    """Return the sum (B, …) of those of n terms (B, n, …) that belong to the document after the last one."""
    if memory_document is not None:
        last = memory_document[:, 1:] == memory_document[:, -1:]
        terms = terms * last.view(*last.shape, *(1,) * (terms.ndim - 2))
    return terms.sum(1)
