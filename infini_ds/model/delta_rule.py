"""The delta rules (Munkhdalai et al. 2024, eq. 5): subtract what the memory already returns for a key, then write.

Shapes: B batch, H heads, N segments, S tokens in a segment, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import MemoryState, prefix_sums, segment_updates
from .memory_rule import AssociativeRule, register_memory_rule
from .sequence_parallel import SequenceGroup

if TYPE_CHECKING:
    from .configuration import InfiniGPTNeoConfig


class DeltaRule(AssociativeRule):
    """M_s = M_{s-1} + phi(K)^T (V - phi(K) M_{s-1} / n) = (I - A_s) M_{s-1} + dM_s, A_s = phi(K)^T diag(1 / n) phi(K).

    All A_s are computed at once; only N products of D x D are left to do in sequence. z is that of the linear rule.

    The paper normalizes with n = phi(K) z_{s-1}. Then A_s z_{s-1} = dz_s, so that I - A_s amplifies after a short
    segment (ragged or packed rows), the more the shorter it was. The bounded form takes n = phi(K) z_s: A_s is then
    symmetric and non-negative, and A_s z_s = dz_s <= z_s, so its eigenvalues lie in [0, 1] (Collatz-Wielandt).
    """

    def __init__(self, name: str, bounded: bool):
        self.name = name
        self.bounded = bounded

    def write(
        self,
        state: MemoryState,
        k: Tensor,
        v: Tensor,
        write_mask: Tensor | None,
        memory_document: Tensor | None,
        parameters: Mapping[str, Tensor],
    ) -> tuple[MemoryState, MemoryState]:
        phi_k = self.key_features(k, write_mask, parameters)
        updates = segment_updates(phi_k, v)
        z, z_after = prefix_sums(state.z, updates.z, memory_document)
        A = self._removals(phi_k, z, z_after)
        M, M_after = recur(state.M.to(z.dtype), A, updates.M, memory_document)
        return MemoryState(M, z), MemoryState(M_after, z_after)

    def write_divided(
        self,
        state: MemoryState,
        k: Tensor,
        v: Tensor,
        write_mask: Tensor | None,
        memory_document: Tensor | None,
        parameters: Mapping[str, Tensor],
        group: SequenceGroup,
    ) -> tuple[MemoryState, MemoryState]:
        """As `write`. What a span does to M is exchanged once z is known."""
        phi_k = self.key_features(k, write_mask, parameters)
        updates = segment_updates(phi_k, v)
        ((z, z_span),), (z_after,) = group.prefix_sums((state.z,), (updates.z,), memory_document)
        A = self._removals(phi_k, z, z_span)
        M, M_after = compose_spans(state.M.to(z.dtype), A, updates.M, memory_document, group)
        return MemoryState(M, z), MemoryState(M_after, z_after)

    def _removals(self, phi_k: Tensor, z: Tensor, z_after: Tensor) -> Tensor:
        """Return A_s of each segment, (B, N, H, D, D).

        Args:
            z: (B, N, H, D) before each segment; z_after: (B, H, D) after the last one.
        """
        if self.bounded:
            z = torch.cat([z[:, 1:], z_after[:, None]], dim=1)  # with the segment itself
        n = phi_k @ z.unsqueeze(-1)  # (B, N, H, S, 1)
        # n is 0 where there is nothing to subtract.
        return phi_k.transpose(-1, -2) @ (phi_k / n.masked_fill(n == 0, torch.inf))

    def flops_per_token(self, config: InfiniGPTNeoConfig) -> float:
        E, S, D = config.hidden_size, config.segment_length, config.head_dim
        correction = E * D * (1 + D / S)  # A_s, and once a segment its product with M
        return super().flops_per_token(config) + correction


def compose_spans(
    M: Tensor, A: Tensor, added: Tensor, memory_document: Tensor | None, group: SequenceGroup
) -> tuple[Tensor, Tensor]:
    """Return what `recur` returns, for a block that is divided over `group`: M before each segment of this rank's span,
    and after the block.

    A span takes M to P M + Q, whatever M is, and the ranks exchange P and Q.

    Args:
        M: (B, H, D, D) before the block; A, added: (B, n, H, D, D) of this rank's segments.
        memory_document: (B, K n + 1), of the segments of all ranks.
    """
    D = M.shape[-1]
    identity = torch.eye(D, dtype=M.dtype, device=M.device).expand_as(M)
    # [P, Q] up to each segment of the span, (B, n, H, D, 2 D), and of the span, (B, H, D, 2 D)
    PQ, PQ_span = recur(F.pad(identity, (0, D)), A, F.pad(added, (D, 0)), group.of_span(memory_document))

    def compose(memory: tuple[Tensor], span: tuple[Tensor, ...]) -> tuple[Tensor]:
        P, Q = span[0].split(D, dim=-1)
        return (P @ memory[0] + Q,)

    (M_span,), (M_after,) = group.scan(compose, (M,), (PQ_span,))
    P, Q = PQ.split(D, dim=-1)  # (B, n, H, D, D)
    return P @ M_span[:, None] + Q, M_after


def recur(X: Tensor, A: Tensor, added: Tensor, memory_document: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return X_s = (I - A_s) X_{s-1} + added_s before each of N segments, (B, N, H, D, C), and after the last one.

    Args:
        X: (B, H, D, C) before the first segment; A: (B, N, H, D, D); added: (B, N, H, D, C).
        memory_document: (B, N + 1), X is set to 0 where it changes. None: one document.
    """
    states = [X]
    for s in range(A.shape[1]):
        before = states[-1]
        if memory_document is not None:
            before = before * (memory_document[:, s] == memory_document[:, s + 1])[:, None, None, None]
        states.append(before - A[:, s] @ before + added[:, s])
    return torch.stack(states[:-1], dim=1), states[-1]


register_memory_rule(DeltaRule("delta", bounded=True))
register_memory_rule(DeltaRule("delta_paper", bounded=False))
