"""What the models return: Hugging Face's outputs, and each layer's memory after the last segment."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from .cache import InfiniCache
from .memory_rule import State


@dataclass
class InfiniModelOutput(ModelOutput):
    """`memory`: each layer's state after the last segment, in the form of its memory rule."""

    last_hidden_state: Tensor | None = None
    past_key_values: InfiniCache | None = None
    memory: tuple[State, ...] | None = None


@dataclass
class InfiniCausalLMOutput(ModelOutput):
    """`loss`: reduced by `loss_reduction`; `logits`: None if they were not requested; `memory`: as above."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: InfiniCache | None = None
    memory: tuple[State, ...] | None = None


@dataclass
class InfiniSequenceClassifierOutput(ModelOutput):
    """`memory`: as above."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory: tuple[State, ...] | None = None
