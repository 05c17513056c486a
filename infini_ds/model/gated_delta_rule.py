"""The gated delta rule: each token replaces what the memory holds for its key, as far as it asks to.

The linear and the softmax rule hold the mean of all values of a key. Where facts change ("Mary went to the garden", and
later "to the kitchen"), the last one counts. This is the delta rule of each token (Schlag et al. 2021,
arXiv:2102.11174) with a learned strength of each write, 0 for a token that has nothing to say of its key:

    M_t = M_{t-1} + b_t phi(k_t)^T (v_t - phi(k_t) M_{t-1}),    b_t = sigmoid(w k_t + c)

phi is softmax(s x) of unit length, so a write of strength 1 replaces an entry exactly, and there is no z.

Shapes: B batch, H heads, N segments, S tokens in a segment, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta_rule import compose_spans, recur
from .memory import memory_dtype
from .memory_rule import MemoryRule, register_memory_rule
from .sequence_parallel import SequenceGroup
from .softmax_rule import initial_log_scale, scaled_softmax

if TYPE_CHECKING:
    from .configuration import InfiniGPTNeoConfig


class Associations(NamedTuple):
    """The state: a value for each key, without a normalization."""

    M: Tensor  # (B, H, D, D) fp32


class GatedDeltaRule(MemoryRule[Associations]):
    """A segment takes M to (I - A) M + Q, with A = phi(K)^T T phi(K), Q = phi(K)^T T V, T = (I + L)^-1 diag(b).

    L is the part of diag(b) phi(K) phi(K)^T below its diagonal (Yang et al. 2024, arXiv:2406.06484, eq. 10). So all
    segments are computed at once, and only N products of D x D are left to do in sequence.
    """

    name = "gated_delta"

    def parameters(self, config: InfiniGPTNeoConfig) -> dict[str, nn.Parameter]:
        H, D = config.num_heads, config.head_dim
        return {
            "log_scale": initial_log_scale(config),  # log s
            "strength": nn.Parameter(torch.zeros(H, D)),  # w
            "strength_bias": nn.Parameter(torch.zeros(H)),  # c
        }

    def features(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return phi of keys or queries (B, N, H, S, D), of unit length, in fp32 or higher."""
        return F.normalize(scaled_softmax(x, parameters["log_scale"]), dim=-1)

    def strengths(self, k: Tensor, write_mask: Tensor | None, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return b (B, N, H, S, 1), 0 for tokens that are not written."""
        k = k.to(memory_dtype(k.dtype))
        w, c = (parameters[name].to(k.dtype) for name in ("strength", "strength_bias"))
        b = torch.sigmoid((k * w[:, None]).sum(-1, keepdim=True) + c[:, None, None])
        return b if write_mask is None else b * write_mask[:, :, None, :, None]

    def empty_state(
        self, B: int, H: int, D: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> Associations:
        return Associations(torch.zeros(B, H, D, D, dtype=dtype, device=device))

    def write(
        self,
        state: Associations,
        k: Tensor,
        v: Tensor,
        write_mask: Tensor | None,
        memory_document: Tensor | None,
        parameters: Mapping[str, Tensor],
    ) -> tuple[Associations, Associations]:
        A, Q = self._segments(k, v, write_mask, parameters)
        before, after = recur(state.M.to(A.dtype), A, Q, memory_document)
        return Associations(before), Associations(after)

    def write_divided(
        self,
        state: Associations,
        k: Tensor,
        v: Tensor,
        write_mask: Tensor | None,
        memory_document: Tensor | None,
        parameters: Mapping[str, Tensor],
        group: SequenceGroup,
    ) -> tuple[Associations, Associations]:
        A, Q = self._segments(k, v, write_mask, parameters)
        before, after = compose_spans(state.M.to(A.dtype), A, Q, memory_document, group)
        return Associations(before), Associations(after)

    def _segments(
        self, k: Tensor, v: Tensor, write_mask: Tensor | None, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return A and Q of each segment, (B, N, H, D, D)."""
        phi, b = self.features(k, parameters), self.strengths(k, write_mask, parameters)
        L = (b * (phi @ phi.mT)).tril(-1)
        right = torch.cat([b * phi, b * v.to(phi.dtype)], dim=-1)
        solved = torch.linalg.solve_triangular(L, right, upper=False, unitriangular=True)  # the diagonal counts as 1
        A, Q = (phi.mT @ solved).chunk(2, dim=-1)
        return A, Q

    def read(self, q: Tensor, before: Associations, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.features(q, parameters) @ before.M

    def flops_per_token(self, config: InfiniGPTNeoConfig) -> float:
        E, S, D = config.hidden_size, config.segment_length, config.head_dim
        # phi phi^T and the solution for phi and V, over half a segment on average; A and Q, and what is read; once a
        # segment the product with M.
        return E * (1.5 * S + 3 * D + D * D / S)


register_memory_rule(GatedDeltaRule())
