"""Sharper features of the memory after training, for texts far longer than those of training.

What all other text leaves on the features of a fact adds up with its length, while training has made it as small as
texts of training need. A larger scale s makes it smaller for any length: of a softmax exp(-s d) is left, d below the
largest. Attention over longer texts has its logits scaled for the same reason (Peng et al. 2023, YaRN,
arXiv:2309.00071).
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
