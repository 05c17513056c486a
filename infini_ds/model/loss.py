"""Cross-entropy of the next token straight from hidden states, so that logits of a whole sequence never exist.

Shapes: R rows (tokens), E width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # the label that counts for nothing, as everywhere in Hugging Face's models
LOGITS = 2**24  # numbers of a chunk's logits at most: 64 MiB in fp32, and products large enough for full speed
ROWS = 1024  # of a chunk at most: with more, products are no faster, and on the CPU each chunk's pages are made anew


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in fp32 (fp64 for fp64) for each row, 0 where the target is IGNORE_INDEX.

    Args:
        hidden: (R, E); weight: (V, E), the output embedding; targets: (R,).
    Returns:
        (R,)
    """

    def chunk_losses(h: Tensor, t: Tensor) -> Tensor:
        return _losses(F.linear(h, weight), t)

    chunks = _chunks(weight, hidden, targets)
    if len(chunks) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk_losses, h, t, use_reentrant=False) for h, t in chunks])
    return torch.cat([chunk_losses(h, t) for h, t in chunks])


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of `token_losses`, with gradients for `hidden` and `weight`.

    The gradients are computed along with the value, chunk by chunk, while the chunk's logits exist: three products in
    all, where recomputing logits in the backward pass takes four. `F.linear_cross_entropy` of torch 2.13 does this too,
    but sums in the precision of its input, which is 1% wrong in bf16.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _SummedLoss.apply(hidden, weight, targets)
    return torch.stack([_losses(F.linear(h, weight), t).sum() for h, t in _chunks(weight, hidden, targets)]).sum()


def chunk_rows(vocabulary: int) -> int:
    """Rows whose logits exist at a time."""
    return max(1, min(ROWS, LOGITS // vocabulary))


def _chunks(weight: Tensor, *of_rows: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of R rows each, split alike."""
    return list(zip(*(x.split(chunk_rows(len(weight))) for x in of_rows), strict=True))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(R,) losses of a chunk."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return F.nll_loss(log_p, targets, ignore_index=IGNORE_INDEX, reduction="none")


def _softmax_and_losses(logits: Tensor, targets: Tensor, out: Tensor) -> Tensor:
    """Of a chunk: its probabilities into `out` (R, V), and (R,) losses, with one exponential of each number.

    A target's own probability may underflow. The greatest never does, so the normalization is taken from there:
    log sum exp(logits) = max(logits) - log(max(p)).
    """
    torch.softmax(logits, -1, out.dtype, out=out)
    below = logits.amax(-1).to(out.dtype) - logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return (below - out.amax(-1).log()).masked_fill_(targets == IGNORE_INDEX, 0)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        lowers = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64  # as autocast does for F.linear
        dtype = torch.get_autocast_dtype(device) if lowers else hidden.dtype
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
            grad_hidden = torch.empty_like(h)
            grad_weight = torch.zeros_like(w, dtype=total.dtype)
            chunks = _chunks(w, h, targets, grad_hidden)
            # For the logits of each chunk and their softmax: memory made anew for each costs more than the softmax.
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
