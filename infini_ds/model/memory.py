"""The compressive memory of Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143): what all memory rules share.

Shapes: B batch, H heads, N segments, S tokens in a segment, D head size. The memory is computed in fp32 whatever the
precision of the model: summed in bf16, z is wrong by more than half after a thousand segments.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

StateT = TypeVar("StateT", bound=tuple[Tensor, ...])  # of any memory rule
PREFIX_CHUNK = 16  # states whose prefix sums are one product; 8 and 32 are about as fast


class MemoryState(NamedTuple):
    """The sums over all tokens that one layer's memory has written: the state of the linear and the delta rules."""

    M: Tensor  # (B, H, D, D) fp32: sum over tokens of phi(k)^T v
    z: Tensor  # (B, H, D) fp32: sum over tokens of phi(k), the normalization


def like_state(state: StateT, tensors: Iterable[Tensor]) -> StateT:
    """Return the tensors as a tuple of the state's type."""
    make = getattr(type(state), "_make", type(state))  # of a NamedTuple
    return make(tensors)


def memory_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the memory: fp32 for a model in fp32 or less, fp64 for one in fp64."""
    return torch.promote_types(model_dtype, torch.float32)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return the context in which memories are computed: in fp32 whatever the precision of the layer."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _phi(x: Tensor) -> Tensor:
    return x.clamp(-40, 0).exp_().add_(x.relu())


class _FeatureMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        phi = _phi(x)
        ctx.save_for_backward(phi)
        return phi

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (phi,) = ctx.saved_tensors
        return grad * phi.clamp_max(1)  # phi is its own derivative where it is at most 1, that is for x <= 0


def feature_map(x: Tensor) -> Tensor:
    """Return phi(x) = ELU(x) + 1 of linear attention (Katharopoulos et al. 2020): positive, in fp32 or higher.

    Computed as ELU(x) + 1, phi is exactly 0 below -17 in fp32; where that happens in all D channels, nothing is
    retrieved and gradients reach 1e30. Computed as exp(x) + relu(x), with x clamped to -40 (phi = 4e-18), phi(q) z
    never underflows. The backward pass needs phi alone, which the matrix products that use it save anyway.
    """
    x = x if x.dtype == torch.float64 else x.float()
    return _FeatureMap.apply(x) if torch.is_grad_enabled() else _phi(x)


def written_features(phi_k: Tensor, write_mask: Tensor | None) -> Tensor:
    """Return phi(K), (B, N, H, S, D), with 0 for tokens that are not written.

    `write_mask`: bool, broadcastable to (B, N, S): the tokens that are written; None for all.
    """
    return phi_k if write_mask is None else phi_k * write_mask[:, :, None, :, None]


def segment_updates(phi_k: Tensor, v: Tensor) -> MemoryState:
    """Return what each segment alone would write to an empty memory: eq. (4), right-hand terms.

    Args:
        phi_k: (B, N, H, S, D) from `written_features`; v: (B, N, H, S, D).
    Returns:
        dM (B, N, H, D, D) and dz (B, N, H, D).
    """
    return MemoryState(phi_k.transpose(-1, -2) @ v.to(phi_k.dtype), phi_k.sum(-2))


def retrieve(phi_q: Tensor, memory: MemoryState) -> Tensor:
    """Return A_mem = phi(Q) M / (phi(Q) z), eq. (3).

    Args:
        phi_q: (B, N, H, S, D); memory: the state that each segment reads, M (B, N, H, D, D) and z (B, N, H, D).
    Returns:
        (B, N, H, S, D) in the precision of the memory; 0 where nothing has been written.
    """
    denominator = (phi_q @ memory.z.unsqueeze(-1)).clamp_min(torch.finfo(memory.z.dtype).tiny)
    return (phi_q @ memory.M) / denominator


def blend(local: Tensor, retrieved: Tensor, beta: Tensor, read_mask: Tensor | None) -> Tensor:
    """Return g A_mem + (1 - g) A_local with g = sigmoid(beta), eq. (6), and A_local where there is nothing to read.

    Args:
        local, retrieved: (B, N, H, S, D); beta: (H,) one gate a head.
        read_mask: bool, broadcastable to (B, N, S): the tokens whose document is in the memory. None: all.
    Returns:
        (B, N, H, S, D) in the precision of `local`.
    """
    gate = torch.sigmoid(beta.to(retrieved.dtype))[:, None, None]
    if read_mask is not None:
        gate = gate * read_mask[:, :, None, :, None]
    return torch.lerp(local.to(retrieved.dtype), retrieved, gate).to(local.dtype)


def prefix_sums(initial: Tensor, terms: Tensor, memory_document: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the running sums before each of N segments, (B, N, …), and after the last one, (B, …).

    Args:
        initial: (B, …) the sum before the first segment; terms: (B, N, …) what each segment adds.
        memory_document: (B, N + 1) the document that the memory holds before each segment and after the last one,
            never decreasing; the sum starts again from 0 where it changes. None: one document.
    """
    return _PrefixSums.apply(initial, terms, memory_document)


class _PrefixSums(torch.autograd.Function):
    """State s, for s from 0 to N: the sum of `initial` and of the first s of `terms`. Returns states 0 to N - 1, and N.

    A term is part of a state if both belong to the same document. A sum over these, and not a difference of two prefix
    sums, keeps documents apart to the last bit. The sums are matrix products with a triangle of zeros and ones, which
    are faster than `cumsum`, for PREFIX_CHUNK states at a time: over all at once the work would grow with N squared.
    The state that a chunk starts from is added outside of the product, so that it stays exact where products are in
    TF32. Gradients are summed in the same way, from the last state to the first.
    """

    @staticmethod
    def forward(ctx, initial: Tensor, new: Tensor, memory_document: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(memory_document)
        before = torch.empty_like(new, memory_format=torch.contiguous_format)
        N, states, terms = new.shape[1], before.flatten(2), new.flatten(2)
        states[:, 0] = initial.flatten(1)
        for first in range(1, N, PREFIX_CHUNK):
            last = min(first + PREFIX_CHUNK, N)
            sums, added = states[:, first:last], terms[:, first - 1 : last - 1]
            sums.copy_(states[:, first - 1 : first] * _same_document(memory_document, first, last, first - 1))
            sums.baddbmm_(_triangle(terms, memory_document, first, last), added)
        after = terms[:, -1:] + states[:, -1:] * _same_document(memory_document, N, N + 1, N - 1)
        return before, after.view(initial.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_before: Tensor, grad_after: Tensor) -> tuple[Tensor, Tensor, None]:
        (memory_document,) = ctx.saved_tensors
        grad_new = torch.empty_like(grad_before, memory_format=torch.contiguous_format)
        N, states, terms = grad_new.shape[1], grad_before.flatten(2), grad_new.flatten(2)
        terms[:, -1] = grad_after.flatten(1)
        for last in range(N, 1, -PREFIX_CHUNK):
            first = max(last - PREFIX_CHUNK, 1)
            sums, added = terms[:, first - 1 : last - 1], states[:, first:last]
            sums.copy_(terms[:, last - 1 : last] * _same_document(memory_document, first, last, last))
            sums.baddbmm_(_triangle(terms, memory_document, first, last).mT, added)
        grad_initial = states[:, :1] + terms[:, :1] * _same_document(memory_document, 0, 1, 1)
        return grad_initial.view(grad_after.shape), grad_new, None


def _same_document(memory_document: Tensor | None, first: int, last: int, other: int) -> Tensor | bool:
    """Return (B, last - first, 1): whether states `first` to `last` - 1 hold the document that state `other` holds."""
    if memory_document is None:
        return True
    return (memory_document[:, first:last] == memory_document[:, other, None])[..., None]


def _triangle(like: Tensor, memory_document: Tensor | None, first: int, last: int) -> Tensor:
    """Return (B, n, n) for states `first` to `last` - 1: 1 where the term of one is part of another, else 0."""
    triangle = like.new_ones(last - first, last - first).tril()
    if memory_document is None:
        return triangle.expand(like.shape[0], -1, -1)
    document = memory_document[:, first:last]
    return triangle * (document[:, :, None] == document[:, None, :])
