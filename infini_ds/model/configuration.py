"""The configuration of Infini-GPT-Neo: GPT-Neo's fields and those of the compressive memory."""

import dataclasses
import inspect
import math

from .versions import check_transformers  # noqa: F401  # first, before what an older transformers does not have

# isort: split
from transformers.models.gpt_neo.configuration_gpt_neo import GPTNeoConfig

from .block_schedule import BlockSchedule
from .memory_rule import get_memory_rule

# isort: split
# Each memory rule registers itself when its file is imported.
from .delta_rule import DeltaRule  # noqa: F401
from .gated_delta_rule import GatedDeltaRule  # noqa: F401
from .linear_rule import LinearRule  # noqa: F401
from .softmax_rule import SoftmaxRule  # noqa: F401

# isort: split
# An export's code is copied by transformers 4, which follows direct imports alone: what the rules import is repeated.
from .memory import MemoryState  # noqa: F401
from .sequence_parallel import SequenceGroup  # noqa: F401

POSITION_EMBEDDINGS = ("segment", "rotary")
SCHEDULE_FIELDS = frozenset(field.name for field in dataclasses.fields(BlockSchedule))


class InfiniGPTNeoConfig(GPTNeoConfig):
    """All fields of `GPTNeoConfig`, and those below.

    Args:
        segment_length: tokens in a segment (S). Local attention reaches back to the start of its segment; the memory
            holds all earlier segments.
        memory_rule: name of a registered `MemoryRule`, which writes and reads the memory: "linear" (Munkhdalai et al.
            2024, eq. 4), "softmax" (eq. 4 with features that are a softmax of scaled keys and queries, which keep facts
            apart from other text however long it is), "delta" (eq. 5, normalized so that it stays bounded whatever the
            lengths of segments), "delta_paper" (eq. 5 as published), "gated_delta" (each token replaces what the memory
            holds for its key, with a learned strength, so that the last of several facts counts).
        position_embedding: "segment": GPT-Neo's learned positions, counted from the start of each segment; "rotary":
            rotary positions in local attention, none in the memory.
        gate_init: initial value of each head's gate beta; sigmoid(beta) is the weight of the memory in its output.
        rotary_base: base of the rotary frequencies (Su et al. 2021, section 3.2.2).
        short_conv: width of a learned causal convolution of keys and values, for local attention and memory alike; 2 is
            a token and the one before it. 0: none.
        embed_conv: width of a learned causal convolution of the token embeddings, which crosses the ends of segments,
            so that the first tokens of a segment know those before. 0: none.

    Raises:
        ValueError: a value is invalid; the sentence names field, value and remedy.
    """

    model_type = "infini_gpt_neo"
    # Of an output: the Trainer would gather them over all batches.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "memory"]

    def __init__(
        self,
        segment_length: int = 128,
        memory_rule: str = "linear",
        position_embedding: str = "segment",
        gate_init: float = 0.0,
        rotary_base: float = 10000.0,
        short_conv: int = 0,
        embed_conv: int = 0,
        **kwargs,
    ):
        self.segment_length = segment_length
        self.memory_rule = memory_rule
        self.position_embedding = position_embedding
        self.gate_init = gate_init
        self.rotary_base = rotary_base
        self.short_conv = short_conv
        self.embed_conv = embed_conv
        _reject_schedule(kwargs)
        for name in ("hidden_size", "num_layers", "num_heads", "window_size"):  # transformers divides by some of them
            if kwargs.get(name, 1) < 1:
                raise ValueError(f"{name}={kwargs[name]} must be at least 1")
        super().__init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "InfiniGPTNeoConfig":
        # For `from_pretrained(path, segment_length=...)`, whose values transformers would set only after the checks.
        _reject_schedule(kwargs)
        given = {name: kwargs.pop(name) for name in inspect.signature(cls.__init__).parameters if name in kwargs}
        # config.json of earlier versions holds the block schedule, which is not a part of the model.
        fields = {name: value for name, value in config_dict.items() if name not in SCHEDULE_FIELDS}
        return super().from_dict(fields | given, **kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def _check(self) -> None:
        if self.segment_length < 1:
            raise ValueError(f"segment_length={self.segment_length} must be at least 1 token")
        if not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init={self.gate_init} must be a finite number, such as 0 for half of the memory")
        for name in ("short_conv", "embed_conv"):
            width = getattr(self, name)
            if width != 0 and width < 2:
                raise ValueError(
                    f"{name}={width} is no width of a convolution: give 2 for a token and the one before it, more for "
                    "more tokens, or 0 for none"
                )
        get_memory_rule(self.memory_rule)
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise ValueError(
                f"position_embedding={self.position_embedding!r} is not one of {', '.join(POSITION_EMBEDDINGS)}"
            )
        if self.position_embedding == "segment" and self.segment_length > self.max_position_embeddings:
            raise ValueError(
                f"segment_length={self.segment_length} is more than max_position_embeddings="
                f"{self.max_position_embeddings}: shorten the segment, or set position_embedding=rotary"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        if self.position_embedding == "rotary" and self.head_dim % 2:
            raise ValueError(f"position_embedding=rotary needs an even head size, this one is {self.head_dim}")


def _reject_schedule(fields: dict) -> None:
    for name in sorted(SCHEDULE_FIELDS & fields.keys()):
        raise ValueError(
            f"{name}={fields[name]} is not a field of InfiniGPTNeoConfig: set model.block_schedule = "
            f"BlockSchedule({name}={fields[name]})"
        )
