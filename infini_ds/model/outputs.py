"""What the models return: Hugging Face's outputs, and each layer's memory after the last segment.

`memory` has each layer's state in the form of its memory rule. Without a cache it is the state after all tokens. With a
cache, which a forward pass outside of training and without labels returns by default, it is the state after the last
full segment: later tokens are in the cache, and are written when their segment is full. For the state after all tokens
pass `use_cache=False`.

`hidden_states`, if requested: (B, T, E) of the embeddings and after each layer, the last one after the last norm; 0 at
padding. `attentions` is always None.

The cache is the field `past_key_values`, or from transformers 5.24 on the field `cache`; the other name is a property.
"""

from dataclasses import dataclass
from typing import TypeVar

from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    SequenceClassifierOutput,
)

from .cache import CACHE_NAME
from .configuration import InfiniGPTNeoConfig
from .memory_rule import State

OutputT = TypeVar("OutputT", bound=ModelOutput)


@dataclass
class InfiniModelOutput(BaseModelOutputWithPast):
    memory: tuple[State, ...] | None = None


@dataclass
class InfiniCausalLMOutput(CausalLMOutputWithPast):
    """`loss`: reduced by `loss_reduction`; `logits`: None if they were not requested."""

    memory: tuple[State, ...] | None = None


if CACHE_NAME == "past_key_values":  # else transformers has the property `past_key_values`
    for _output in (InfiniModelOutput, InfiniCausalLMOutput):
        _output.cache = property(lambda self: self.past_key_values)  # type: ignore[union-attr]


@dataclass
class InfiniSequenceClassifierOutput(SequenceClassifierOutput):
    memory: tuple[State, ...] | None = None


def wants_dict(return_dict: bool | None, config: InfiniGPTNeoConfig) -> bool:
    """Return whether a forward pass returns an output with names, as argument or configuration decide."""
    return getattr(config, "return_dict", True) if return_dict is None else return_dict


def as_requested(output: OutputT, named: bool) -> OutputT | tuple:
    """Return the output, or a tuple of its values in the order of transformers, without `memory`."""
    return output if named else tuple(value for name, value in output.items() if name != "memory")
