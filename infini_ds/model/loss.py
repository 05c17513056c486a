"""Cross-entropy of the next token straight from hidden states, so that logits of a whole sequence never exist."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label that counts for nothing, as everywhere in Hugging Face's models
CHUNK = 1024  # rows of logits that exist at a time; from here on longer chunks were not faster


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in fp32 for each row, 0 where the target is IGNORED.

    Args:
        hidden: (R, E); weight: (V, E), the output embedding; targets: (R,).
    Returns:
        (R,)
    """

    def chunk_losses(h: Tensor, t: Tensor) -> Tensor:
        logits = F.linear(h, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, t, ignore_index=IGNORED, reduction="none")

    if hidden.shape[0] <= CHUNK:
        return chunk_losses(hidden, targets)
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk_losses(h, t) for h, t in chunks])
    return torch.cat([checkpoint(chunk_losses, h, t, use_reentrant=False) for h, t in chunks])


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of `token_losses`, by torch's own fused form where this torch has it.

    That form sums in the precision of its input, which loses 1% in bf16: it is for full precision only.
    """
    if hasattr(F, "linear_cross_entropy") and hidden.dtype in (torch.float32, torch.float64):
        options = torch.nn.LinearCrossEntropyOptions() if hidden.shape[0] > CHUNK else None
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", ignore_index=IGNORED, options=options)
    return token_losses(hidden, weight, targets).sum()
