"""Cross-entropy of the next token computed from hidden states, so that a sequence's logits are never materialized.

Shapes: R rows (tokens), E width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a label that is ignored, as in all of Hugging Face's models
MAX_CHUNK_LOGITS = 2**24  # of a chunk: 64 MiB in fp32, and matrix products large enough for full speed
MAX_CHUNK_ROWS = 1024  # with more, products are no faster, and on the CPU each chunk's pages are allocated again


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) for each row, in fp32 (fp64 for fp64), and 0 where the target is IGNORE_INDEX.

    Args:
        hidden: (R, E); weight: (V, E), the output embedding; targets: (R,).
    Returns:
        (R,)
    """
    return _losses_in_chunks(lambda rows: F.linear(rows, weight), hidden, targets, len(weight))


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of `token_losses`, with gradients for `hidden` and `weight`.

    The gradients are computed along with the value, chunk by chunk, while the chunk's logits exist: three matrix
    products, where recomputing the logits in the backward pass takes four. `F.linear_cross_entropy` of torch 2.13 does
    the same, but sums in the precision of its input, which in bf16 is off by 1%.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _SummedLoss.apply(hidden, weight, targets)
    return torch.stack([_losses(F.linear(h, weight), t).sum() for h, t in _chunks(len(weight), hidden, targets)]).sum()


def plain_weight(layer: nn.Module, hidden: Tensor) -> Tensor | None:
    """Return the weight of an output layer if the layer computes hidden @ weight.T and nothing else, else None.

    A layer that is wrapped (LoRA), quantized, parametrized or offloaded, or has a bias or a hook, has to be called.
    """
    if type(layer) is not nn.Linear or layer.bias is not None or "forward" in vars(layer) or hasattr(layer, "_hf_hook"):
        return None
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or nn.modules.module._has_any_global_hook():
        return None
    weight = layer.weight
    if type(weight) not in (nn.Parameter, Tensor) and not isinstance(weight, FakeTensor):  # quantized or sharded
        return None
    plain = weight.ndim == 2 and weight.shape[1] == hidden.shape[-1] and weight.device == hidden.device
    return weight if plain and weight.is_floating_point() else None


def layer_losses(hidden: Tensor, layer: nn.Module, targets: Tensor, vocabulary: int) -> Tensor:
    """Return `token_losses` (R,) of the logits that the output layer gives when it is called, one chunk at a time.

    Args:
        hidden: (R, E); targets: (R,); vocabulary: the number of logits, which decides the size of a chunk.
    """
    # (1, R, E): added modules and hooks expect rows of tokens.
    return _losses_in_chunks(lambda rows: layer(rows[None])[0], hidden, targets, vocabulary)


def chunk_rows(vocabulary: int) -> int:
    """Return how many rows' logits exist at a time."""
    return max(1, min(MAX_CHUNK_ROWS, MAX_CHUNK_LOGITS // vocabulary))


def _chunks(vocabulary: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return tensors of R rows each, split into the same chunks."""
    return list(zip(*(x.split(chunk_rows(vocabulary)) for x in tensors), strict=True))


def _losses_in_chunks(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int
) -> Tensor:
    """Return the losses (R,). The backward pass computes a chunk's logits again, unless there is only one chunk."""

    def chunk_losses(rows: Tensor, t: Tensor) -> Tensor:
        return _losses(logits_of(rows), t)

    chunks = _chunks(vocabulary, hidden, targets)
    if len(chunks) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk_losses, rows, t, use_reentrant=False) for rows, t in chunks])
    return torch.cat([chunk_losses(rows, t) for rows, t in chunks])


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses (R,) of a chunk."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return F.nll_loss(log_p, targets, ignore_index=IGNORE_INDEX, reduction="none")


def _softmax_and_losses(logits: Tensor, targets: Tensor, out: Tensor) -> Tensor:
    """Write a chunk's probabilities into `out` (R, V) and return its losses (R,), with one exponential a logit.

    A target's own probability may underflow. The largest one never does, so the normalization is taken from it:
    log sum exp(logits) = max(logits) - log(max(p)).
    """
    torch.softmax(logits, -1, out.dtype, out=out)
    below = logits.amax(-1).to(out.dtype) - logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return (below - out.amax(-1).log()).masked_fill_(targets == IGNORE_INDEX, 0)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64  # as for F.linear
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
            grad_hidden = torch.empty_like(h)
            grad_weight = torch.zeros_like(w, dtype=total.dtype)
            chunks = _chunks(len(w), h, targets, grad_hidden)
            # All chunks share two buffers: allocating them for each chunk costs more time than the softmax.
            size = len(chunks[0][0]), len(w)
            logits, p = h.new_empty(size), h.new_empty(size, dtype=total.dtype)
            for rows, t, grad_rows in chunks:
                n = len(rows)
                losses = _softmax_and_losses(torch.mm(rows, w.t(), out=logits[:n]), t, out=p[:n])
                total += losses.sum()
                # d loss / d logits = p - onehot(target)
                counted = (t != IGNORE_INDEX)[:, None]
                grad = p[:n].scatter_add_(1, t.clamp_min(0)[:, None], -torch.ones_like(p[:n, :1])).to(dtype)
                torch.mul(grad @ w, counted, out=grad_rows)
                rows = rows * counted
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad.t(), rows)
                else:
                    grad_weight += grad.t() @ rows
            ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight * grad_total.to(grad_weight.dtype), None
