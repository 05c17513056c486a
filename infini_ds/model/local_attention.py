"""GPT-Neo's causal attention inside a segment.

Shapes: B rows times segments, H heads, S queries, K keys, D head size.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, dropout: float = 0.0, causal: bool = True
) -> Tensor:
    """Return softmax(q k^T) v, eq. (2), without the factor 1 / sqrt(D): GPT-Neo does not scale its scores.

    Args:
        q: (B, H, S, D); k, v: (B, H, K, D).
        mask: bool, broadcastable to (B, H, S, K), with at least one key for each query; or a `document_mask`, with
            which dropout is not applied; or None: causal, S = K, unless `causal` is False: all keys.
    """
    if isinstance(mask, BlockMask):
        # Without compilation flex attention computes all scores: on the CPU it is correct, but not fast.
        attention: Callable[..., Tensor] = flex_attention
        if q.device.type == "cuda":
            attention = _compiled_flex_attention()
        return attention(q, k, v, block_mask=mask, scale=1.0)
    causal = causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=1.0)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def document_mask(documents: Tensor, window: int | None, tile: int = 128) -> BlockMask:
    """Return the mask of causal attention within each document and within `window` tokens, for flex attention.

    Flex attention evaluates it tile by tile, so the S x S mask is never materialized.

    Args:
        documents: (B, S) the document of each slot.
        window: how many tokens back a token attends, itself included; None for all.
        tile: tokens of a tile's side; 128 is flex attention's default.
    """
    B, S = documents.shape
    window = window or S

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query >= key) & (query - key < window)
        return near & (documents[row, query] == documents[row, key])

    tiles = torch.arange(-(-S // tile), device=documents.device)
    first = ((tiles * tile - window + 1) // tile).clamp_min(0)  # the first tile of keys for each tile of queries
    count = (tiles - first + 1).expand(B, 1, -1)
    index = (first[:, None] + tiles).clamp_max(len(tiles) - 1).expand(B, 1, -1, -1)
    return BlockMask.from_kv_blocks(
        count.int(), index.int().contiguous(), BLOCK_SIZE=tile, mask_mod=attends, seq_lengths=(S, S)
    )


def rotary_angles(positions: Tensor, D: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin (…, D) of the rotary embedding at integer `positions` (…) (Su et al. 2021, eq. 34)."""
    frequency = base ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
    angle = positions[..., None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (…, D) rotated by the angles, in the half-split layout of Hugging Face's models."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
