"""The compressive memory of Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143), as functions on tensors.

Shapes: B batch, H heads, N segments, S tokens in a segment, D head size. The memory is computed in fp32 whatever the
precision of the model: summed in bf16, z is wrong by more than half after a thousand segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PREFIX_CHUNK = 16  # states whose prefix sums are one product; 8 and 32 are about as fast


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
) -> tuple[MemoryState, MemoryState]:
    """The memory before each of N segments, M (B, N, H, D, D) and z (B, N, H, D), and after the last, without N.

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


def accumulate(
    state: MemoryState, segments: MemoryState, document_held: Tensor | None = None
) -> tuple[MemoryState, MemoryState]:
    """The linear rule, M_s = M_{s-1} + phi(K_s)^T V_s (eq. 4), for all segments at once.

    Args:
        state: the memory before the first segment.
        segments: what each segment adds, from `summarize`.
        document_held: (B, N + 1) the document that the memory holds before each segment and after the last, never
            decreasing; the memory is emptied where it changes. None: one document.
    Returns:
        The memory before each segment, M (B, N, H, D, D) and z (B, N, H, D), and after the last, without N.
    """
    M_before, M_after = _PrefixSums.apply(state.M, segments.M, document_held)
    z_before, z_after = _PrefixSums.apply(state.z, segments.z, document_held)
    return MemoryState(M_before, z_before), MemoryState(M_after, z_after)


class _PrefixSums(torch.autograd.Function):
    """State s, for s from 0 to N: the sum of `old` (B, …) and the first s terms of `new` (B, N, …), begun again where
    the document held changes. Returns states 0 to N - 1, (B, N, …), and state N, (B, …).

    A term is part of a state if both belong to the same document. A sum over these, and not a difference of two prefix
    sums, keeps documents apart to the last bit. The sums are products with a triangle of zeros and ones, which are
    faster than `cumsum`, for some states at a time: over all at once the work would grow with N squared. The state that
    they go on from is added apart, so that it stays exact where products are in TF32. Gradients are summed in the same
    way, from the last state to the first.
    """

    @staticmethod
    def forward(ctx, old: Tensor, new: Tensor, document_held: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(document_held)
        before = torch.empty_like(new, memory_format=torch.contiguous_format)
        N, states, terms = new.shape[1], before.flatten(2), new.flatten(2)
        states[:, 0] = old.flatten(1)
        for first in range(1, N, PREFIX_CHUNK):
            last = min(first + PREFIX_CHUNK, N)
            sums, added = states[:, first:last], terms[:, first - 1 : last - 1]
            sums.copy_(states[:, first - 1 : first] * _same_document(document_held, first, last, first - 1))
            sums.baddbmm_(_triangle(terms, document_held, first, last), added)
        after = terms[:, -1:] + states[:, -1:] * _same_document(document_held, N, N + 1, N - 1)
        return before, after.view(old.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_before: Tensor, grad_after: Tensor) -> tuple[Tensor, Tensor, None]:
        (document_held,) = ctx.saved_tensors
        grad_new = torch.empty_like(grad_before, memory_format=torch.contiguous_format)
        N, states, terms = grad_new.shape[1], grad_before.flatten(2), grad_new.flatten(2)
        terms[:, -1] = grad_after.flatten(1)
        for last in range(N, 1, -PREFIX_CHUNK):
            first = max(last - PREFIX_CHUNK, 1)
            sums, added = terms[:, first - 1 : last - 1], states[:, first:last]
            sums.copy_(terms[:, last - 1 : last] * _same_document(document_held, first, last, last))
            sums.baddbmm_(_triangle(terms, document_held, first, last).mT, added)
        grad_old = states[:, :1] + terms[:, :1] * _same_document(document_held, 0, 1, 1)
        return grad_old.view(grad_after.shape), grad_new, None


def _same_document(document_held: Tensor | None, first: int, last: int, other: int) -> Tensor | bool:
    """(B, last - first, 1): whether the states from `first` on, before `last`, hold the document that `other` holds."""
    if document_held is None:
        return True
    return (document_held[:, first:last] == document_held[:, other, None])[..., None]


def _triangle(like: Tensor, document_held: Tensor | None, first: int, last: int) -> Tensor:
    """(B, n, n) of n states from `first` on, before `last`: 1 where the term of one is part of another, else 0."""
    triangle = like.new_ones(last - first, last - first).tril()
    if document_held is None:
        return triangle.expand(like.shape[0], -1, -1)
    held = document_held[:, first:last]
    return triangle * (held[:, :, None] == held[:, None, :])


def correct(
    state: MemoryState, segments: MemoryState, phi_k: Tensor, document_held: Tensor | None, bounded: bool
) -> tuple[MemoryState, MemoryState]:
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
    z, z_after = _PrefixSums.apply(state.z, segments.z, document_held)
    with_own = torch.cat([z[:, 1:], z_after[:, None]], dim=1)
    n = phi_k @ (with_own if bounded else z).unsqueeze(-1)  # (B, N, H, S, 1)
    A = phi_k.transpose(-1, -2) @ (phi_k / n.masked_fill(n == 0, 1))  # n is 0 where there is nothing to correct
    memories = [state.M.to(z.dtype)]
    for s in range(phi_k.shape[1]):
        before = memories[-1]
        if document_held is not None:
            before = before * (document_held[:, s] == document_held[:, s + 1])[:, None, None, None]
        memories.append(before - A[:, s] @ before + segments.M[:, s])
    return MemoryState(torch.stack(memories[:-1], dim=1), z), MemoryState(memories[-1], z_after)


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
