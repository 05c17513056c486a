"""The compressive memory of Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143), as functions on tensors.

Shapes: B batch, H heads, N segments, S tokens in a segment, D head size. The memory is computed in fp32 whatever the
precision of the model: summed in bf16, z is wrong by more than half after a thousand segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TRIANGLE = 32  # segments: their prefix sums by a product cost less than a segment of 32 tokens or more


class MemoryState(NamedTuple):
    """What one layer remembers of all segments so far."""

    M: Tensor  # (B, H, D, D) fp32: sum over tokens of phi(k)^T v
    z: Tensor  # (B, H, D) fp32: sum over tokens of phi(k), the normalization

    @classmethod
    def empty(cls, B: int, H: int, D: int, model_dtype: torch.dtype, device=None) -> "MemoryState":
        """Nothing remembered; fp32 for a model in fp32 or less, fp64 for one in fp64."""
        options = {"dtype": torch.promote_types(model_dtype, torch.float32), "device": device}
        return cls(torch.zeros(B, H, D, D, **options), torch.zeros(B, H, D, **options))


class _FeatureMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        phi = x.clamp(-40, 0).exp_().add_(x.relu())
        ctx.save_for_backward(phi)
        return phi

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (phi,) = ctx.saved_tensors
        return grad * phi.clamp_max(1)  # phi is its own derivative where it is at most 1, that is up to 0


def feature_map(x: Tensor) -> Tensor:
    """phi of linear attention (Katharopoulos et al. 2020): ELU(x) + 1, positive, in fp32 or higher.

    ELU(x) + 1 as written is exactly 0 below -17 in fp32; where that happens in all D places, nothing is retrieved and
    gradients reach 1e30. So: exp(x) + relu(x), held at 4e-18 from -40 on, and phi(q) z never underflows. For the
    backward pass phi alone is kept, which the products that use it keep anyway.
    """
    return _FeatureMap.apply(x if x.dtype == torch.float64 else x.float())


def written_features(k: Tensor, write: Tensor | None = None) -> Tensor:
    """phi(K) (B, N, H, S, D), 0 for tokens that do not write.

    `write`: bool, broadcastable to (B, N, S): the tokens that write; None for all.
    """
    phi_k = feature_map(k)
    return phi_k if write is None else phi_k * write[:, :, None, :, None]


def summarize(phi_k: Tensor, v: Tensor) -> MemoryState:
    """What each segment alone would put into an empty memory: eq. (4), right-hand terms.

    Args:
        phi_k: (B, N, H, S, D) from `written_features`; v: (B, N, H, S, D).
    Returns:
        M (B, N, H, D, D) and z (B, N, H, D).
    """
    return MemoryState(phi_k.transpose(-1, -2) @ v.to(phi_k.dtype), phi_k.sum(-2))


def update(
    rule: str,
    state: MemoryState,
    k: Tensor,
    v: Tensor,
    write: Tensor | None = None,
    document_held: Tensor | None = None,
) -> MemoryState:
    """The memory before each of N segments and after the last: M (B, N + 1, H, D, D), z (B, N + 1, H, D).

    Args:
        rule: "linear", "delta" or "delta_paper", see `accumulate` and `correct`.
        state: the memory before the first segment; k, v: (B, N, H, S, D); write: as for `written_features`;
            document_held: as for `accumulate`.
    """
    phi_k = written_features(k, write)
    segments = summarize(phi_k, v)
    if rule == "linear":
        return accumulate(state, segments, document_held)
    return correct(state, segments, phi_k, document_held, bounded=rule == "delta")


def accumulate(state: MemoryState, segments: MemoryState, document_held: Tensor | None = None) -> MemoryState:
    """The linear rule, M_s = M_{s-1} + phi(K_s)^T V_s (eq. 4), for all segments at once.

    Args:
        state: the memory before the first segment.
        segments: what each segment adds, from `summarize`.
        document_held: (B, N + 1) the document that the memory holds before each segment and after the last, never
            decreasing; the memory is emptied where it changes. None: one document.
    Returns:
        The memory before each segment and after the last: M (B, N + 1, H, D, D), z (B, N + 1, H, D).
    """
    return MemoryState(*(_prefix_sums(old, new, document_held) for old, new in zip(state, segments, strict=True)))


def _prefix_sums(old: Tensor, new: Tensor, document_held: Tensor | None) -> Tensor:
    """Sums of `old` (B, …) and the first 0, 1, … N of `new` (B, N, …), begun again where the document held changes.

    Segment j is part of the memory after segment s if j <= s and the memory then holds the same document. A sum over
    these, and not a difference of two prefix sums, keeps documents apart to the last bit. The sums are products with a
    triangle of zeros and ones, which are faster than `cumsum`, for some segments at a time: over all N at once the work
    would grow with N squared. What is carried on is added apart, so that it stays exact where products are in TF32.
    """
    sums, trailing = [old.unsqueeze(1).to(new.dtype)], (1,) * (new.dim() - 2)
    for index, terms in enumerate(new.split(TRIANGLE, dim=1)):
        first, carried = index * TRIANGLE, sums[-1][:, -1:]
        if document_held is None:
            part = terms.new_ones(1, terms.shape[1], terms.shape[1]).tril()
        else:
            held = document_held[:, first + 1 : first + 1 + terms.shape[1]]
            part = (held[:, :, None] == held[:, None, :]).tril().to(terms.dtype)
            carried = carried * (held == document_held[:, first : first + 1]).view(*held.shape, *trailing)
        sums.append((part @ terms.flatten(2)).view_as(terms) + carried)
    return torch.cat(sums, dim=1)


def correct(
    state: MemoryState, segments: MemoryState, phi_k: Tensor, document_held: Tensor | None, bounded: bool
) -> MemoryState:
    """The delta rule (eq. 5): what the memory already returns for a key is taken off before its value is written.

    M_s = M_{s-1} + phi(K)^T (V - phi(K) M_{s-1} / n) = (I - A_s) M_{s-1} + dM_s, A_s = phi(K)^T diag(1 / n) phi(K).
    All A_s are computed at once; what is left to do one after the other is N products of D x D.

    The paper normalizes with n = phi(K) z_{s-1}. Then A_s z_{s-1} = dz_s, so a short segment before a long one (ragged
    or packed rows) makes I - A_s amplify, the more the shorter it was. `bounded` takes n = phi(K) z_s: A_s is
    symmetric, not negative, and A_s z_s = dz_s <= z_s, so its eigenvalues lie in [0, 1] (Collatz-Wielandt).

    Args:
        state, segments, document_held: as for `accumulate`.
        phi_k: (B, N, H, S, D), 0 for tokens that do not write.
    Returns:
        As `accumulate`.
    """
    z = _prefix_sums(state.z, segments.z, document_held)
    n = phi_k @ (z[:, 1:] if bounded else z[:, :-1]).unsqueeze(-1)  # (B, N, H, S, 1)
    A = phi_k.transpose(-1, -2) @ (phi_k / n.masked_fill(n == 0, 1))  # n is 0 where there is nothing to correct
    memories = [state.M.to(z.dtype)]
    for s in range(phi_k.shape[1]):
        before = memories[-1]
        if document_held is not None:
            before = before * (document_held[:, s] == document_held[:, s + 1])[:, None, None, None]
        memories.append(before - A[:, s] @ before + segments.M[:, s])
    return MemoryState(torch.stack(memories, dim=1), z)


def retrieve(q: Tensor, memory: MemoryState) -> Tensor:
    """A_mem = phi(Q) M / (phi(Q) z), eq. (3).

    Args:
        q: (B, N, H, S, D); memory: the state that each segment reads, M (B, N, H, D, D) and z (B, N, H, D).
    Returns:
        (B, N, H, S, D) in the precision of the memory; 0 where nothing has been written.
    """
    phi_q = feature_map(q)
    denominator = (phi_q @ memory.z.unsqueeze(-1)).clamp_min(torch.finfo(memory.z.dtype).tiny)
    return (phi_q @ memory.M) / denominator


def blend(local: Tensor, retrieved: Tensor, beta: Tensor, read: Tensor) -> Tensor:
    """g A_mem + (1 - g) A_local with g = sigmoid(beta), eq. (6); local attention alone where there is nothing to read.

    Args:
        local, retrieved: (B, N, H, S, D); beta: (H,) one gate a head.
        read: bool, broadcastable to (B, N, S): the tokens whose document is in the memory.
    Returns:
        (B, N, H, S, D) in the precision of `local`.
    """
    gate = torch.sigmoid(beta.to(retrieved.dtype))[:, None, None] * read[:, :, None, :, None]
    return torch.lerp(local.to(retrieved.dtype), retrieved, gate).to(local.dtype)
