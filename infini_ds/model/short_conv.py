"""A short causal convolution of keys and values, so that an entry of the memory knows the tokens before its own.

An entry phi(k_t)^T v_t binds what token t knows. In "key value" it is made at the value, so the key has to come into k
from the token before; in "value key" the value has to come into v. Local attention gets the same keys and values.

Shapes: B batch, H heads, N segments, S slots in a segment, D head size, E = H * D channels, w width.
"""

import torch
from torch import Tensor, nn

from .configuration import InfiniGPTNeoConfig


class ShortConvolution(nn.Module):
    """k_t and v_t become sum_j c_j x_{t-j}, 0 <= j < w, per channel, with weights of their own.

    It starts again in each segment and in each document, where the missing tokens count as 0. So it has no state, and
    segments can be computed in any order.
    """

    def __init__(self, config: InfiniGPTNeoConfig):
        super().__init__()
        self.k = nn.Parameter(torch.empty(config.short_conv, config.hidden_size))  # (w, E), c_0 first
        self.v = nn.Parameter(torch.empty(config.short_conv, config.hidden_size))
        self.start()

    def start(self) -> None:
        """Set all weights to 1 / w, with which a new model learns fastest (docs/recall.md)."""
        for weight in (self.k, self.v):
            fill_taps(weight, 1 / len(weight), 1 / len(weight))

    def start_as_identity(self) -> None:
        """Set c_0 to 1 and all others to 0, with which a model that was trained without stays what it is."""
        for weight in (self.k, self.v):
            fill_taps(weight, 1.0, 0.0)

    def forward(self, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, N, H, S, D).

        Args:
            k, v: (B, N, H, S, D) of complete segments, those of cached tokens included, as they were projected.
            documents: (B, N, S), if a segment may hold several.
        """
        return short_convolution(k, self.k, documents), short_convolution(v, self.v, documents)


@torch.no_grad()
def fill_taps(weight: Tensor, first: float, others: float, std: float = 0.0) -> None:
    """Set the weights (w, E) of a convolution, c_0 to `first` and all others to `others` plus noise, unless loaded."""
    if getattr(weight, "_is_hf_initialized", False):  # transformers' flag of loaded weights
        return
    nn.init.normal_(weight, others, std) if std else weight.fill_(others)
    weight[0].fill_(first)


def short_convolution(x: Tensor, weight: Tensor, documents: Tensor | None = None) -> Tensor:
    """Return sum_j c_j x_{t-j} over the tokens of the same segment and document.

    Args:
        x: (B, N, H, S, D); weight: (w, H * D); documents: (B, N, S) the document of each slot, or None.
    """
    # Under autocast, x has a lower precision than the weights.
    weight = weight.to(x.dtype).view(len(weight), x.shape[2], 1, x.shape[4])
    return _ShortConvolution.apply(x, weight, documents)


class _ShortConvolution(torch.autograd.Function):
    """Adds shifted views in place. It saves x alone, and takes less time than autograd of the same sums or `conv1d`.

    docs/infini-attention.md has the times.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, documents: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, documents)
        out = x * weight[0]
        for j in range(1, len(weight)):
            out[..., j:, :].addcmul_(_masked(x[..., :-j, :], documents, j), weight[j])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, documents = ctx.saved_tensors
        grad_x, grad_weight = grad * weight[0], torch.empty_like(weight)
        grad_weight[0] = _sum_over_tokens(grad * x)
        for j in range(1, len(weight)):
            later = _masked(grad[..., j:, :], documents, j)
            grad_x[..., :-j, :].addcmul_(later, weight[j])
            grad_weight[j] = _sum_over_tokens(later * x[..., :-j, :])
        return grad_x, grad_weight, None


def _masked(shifted: Tensor, documents: Tensor | None, j: int) -> Tensor:
    """Return the values of pairs of tokens that are j slots apart, 0 where they are of different documents."""
    if documents is None:
        return shifted
    same = documents[..., j:] == documents[..., :-j]
    return shifted * same[:, :, None, :, None]


def _sum_over_tokens(products: Tensor) -> Tensor:
    return products.sum((0, 1, 3))[:, None]  # (B, N, H, S, D) -> (H, 1, D)
