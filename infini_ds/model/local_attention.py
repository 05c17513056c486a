"""GPT-Neo's causal attention inside a segment.

Shapes: B rows times segments, H heads, S queries, K keys, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def local_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T) v without the 1 / sqrt(D) of other models: GPT-Neo does not scale its scores.

    Args:
        q: (B, H, S, D); k, v: (B, H, K, D).
        mask: bool, broadcastable to (B, H, S, K), each query with at least one key; None: causal, S = K.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=1.0)


def rotary_angles(positions: Tensor, D: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (…, D) of the rotary embedding at integer `positions` (…) (Su et al. 2021, eq. 34)."""
    frequency = base ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
    angle = positions[..., None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (…, D) turned by the angles, in the half-split layout of Hugging Face's models."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
