"""The delta rules (Munkhdalai et al. 2024, eq. 5): subtract what the memory already returns for a key, then write.

Shapes: B batch, H heads, N segments, S tokens in a segment, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .memory import MemoryState, key_features, prefix_sums, segment_updates
from .memory_rule import AssociativeRule, register_memory_rule

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
        phi_k = key_features(k, write_mask)
        updates = segment_updates(phi_k, v)
        z, z_after = prefix_sums(state.z, updates.z, memory_document)
        z_own = torch.cat([z[:, 1:], z_after[:, None]], dim=1)  # with the segment itself
        n = phi_k @ (z_own if self.bounded else z).unsqueeze(-1)  # (B, N, H, S, 1)
        A = phi_k.transpose(-1, -2) @ (phi_k / n.masked_fill(n == 0, 1))  # n is 0 where there is nothing to subtract
        M = [state.M.to(z.dtype)]
        for s in range(phi_k.shape[1]):
            before = M[-1]
            if memory_document is not None:
                before = before * (memory_document[:, s] == memory_document[:, s + 1])[:, None, None, None]
            M.append(before - A[:, s] @ before + updates.M[:, s])
        return MemoryState(torch.stack(M[:-1], dim=1), z), MemoryState(M[-1], z_after)

    def flops_per_token(self, config: InfiniGPTNeoConfig) -> float:
        E, S, D = config.hidden_size, config.segment_length, config.head_dim
        correction = E * D * (1 + D / S)  # A_s, and once a segment its product with M
        return super().flops_per_token(config) + correction


register_memory_rule(DeltaRule("delta", bounded=True))
register_memory_rule(DeltaRule("delta_paper", bounded=False))
