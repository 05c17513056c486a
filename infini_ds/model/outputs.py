"""What the models return: Hugging Face's outputs, and each layer's memory after the last segment.

`memory` has each layer's state in the form of its memory rule: after the last segment or, with a cache, after the last
full one. `hidden_states`, if requested: (B, T, E) of the embeddings and after each layer, the last one after the last
norm; 0 at padding.
"""

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from .cache import InfiniCache
from .configuration import InfiniGPTNeoConfig
from .memory_rule import State

OutputT = TypeVar("OutputT", bound=ModelOutput)


@dataclass
class InfiniModelOutput(ModelOutput):
    last_hidden_state: Tensor | None = None
    past_key_values: InfiniCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory: tuple[State, ...] | None = None


@dataclass
class InfiniCausalLMOutput(ModelOutput):
    """`loss`: reduced by `loss_reduction`; `logits`: None if they were not requested."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: InfiniCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory: tuple[State, ...] | None = None


@dataclass
class InfiniSequenceClassifierOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory: tuple[State, ...] | None = None


def wants_dict(return_dict: bool | None, config: InfiniGPTNeoConfig) -> bool:
    """Return whether a forward pass returns an output with names, as argument or configuration decide."""
    return getattr(config, "return_dict", True) if return_dict is None else return_dict


def as_requested(output: OutputT, named: bool) -> OutputT | tuple:
    """Return the output, or a tuple of its values in the order of transformers, without `memory`."""
    return output if named else tuple(value for name, value in output.items() if name != "memory")
