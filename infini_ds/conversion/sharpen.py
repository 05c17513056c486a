"""Sharper features of the memory after training, for texts far longer than those of training.

Text that leaves a little of each token on the features of a fact covers it once it is long enough, and training makes
that little no smaller than its own texts need. In a softmax with scale s it is exp(-s d) for a feature d below the
largest one, so a larger s makes it smaller at every length. Attention over texts longer than those of training has its
logits scaled too (YaRN, Peng et al. 2023, arXiv:2309.00071).
"""

import math

import torch

from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError

SCALE = "log_scale"  # the parameter of a memory rule with softmax features, `scaled_softmax`


@torch.no_grad()
def sharpen_memory(model: InfiniGPTNeoForCausalLM, factor: float) -> None:
    """Multiply the scales s of all softmax features by a factor, in place.

    Raises:
        UserError: the factor is not a number above 0, or the memory rule has no such scale.
    """
    if not 0 < factor < math.inf:
        raise UserError(f"--sharpen-memory {factor}: give a number above 0, such as 1.5")
    scales = [parameter for name, parameter in model.named_parameters() if name.endswith(f".{SCALE}")]
    if not scales:
        raise UserError(
            f"--sharpen-memory {factor}: the features of memory_rule={model.config.memory_rule} have no scale; "
            "only those of softmax and gated_delta have one"
        )
    for scale in scales:
        scale.add_(math.log(factor))
