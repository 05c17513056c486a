"""The seam for memory rules: how a layer's memory is written and read. A rule is one file that registers itself.

The model passes a rule's state through blocks, recomputation, caches and exports without looking inside, so a state may
be any tuple of tensors. `linear_rule.py` is the shortest example.

Shapes: B batch, H heads, N segments, S tokens in a segment, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias

import torch
from torch import Tensor, nn

from .memory import MemoryState, StateT, feature_map, like_state, retrieve, written_features
from .sequence_parallel import SequenceGroup

if TYPE_CHECKING:
    from .configuration import InfiniGPTNeoConfig

State: TypeAlias = tuple[Tensor, ...]
OptimizerGroup = Literal["decay", "no_decay", "gates"]


class MemoryRule(ABC, Generic[StateT]):
    """One way to write and read a layer's memory. A rule itself is stateless: all layers of all models share it.

    Attributes:
        name: value of the configuration's `memory_rule`.
        optimizer_group: of the rule's own parameters: "decay" (weight decay), "no_decay", or "gates" (no weight decay,
            and the learning rate of the gates).
    """

    name: str
    optimizer_group: OptimizerGroup = "no_decay"

    def parameters(self, config: InfiniGPTNeoConfig) -> dict[str, nn.Parameter]:
        """Return a layer's own parameters of the rule with their initial values, by names without a dot.

        They are `layer.attention.memory_parameters`.
        """
        return {}

    @abstractmethod
    def empty_state(self, B: int, H: int, D: int, dtype: torch.dtype, device: torch.device | str | None) -> StateT:
        """Return the memory of B rows to which nothing has been written: a tuple of tensors (B, …), all in `dtype`."""

    @abstractmethod
    def write(
        self,
        state: StateT,
        k: Tensor,
        v: Tensor,
        write_mask: Tensor | None,
        memory_document: Tensor | None,
        parameters: Mapping[str, Tensor],
    ) -> tuple[StateT, StateT]:
        """Return the memory before each of N segments, as tensors (B, N, …), and after the last one, (B, …).

        A segment without a token to write (padding, or a segment that a cache keeps open) must leave the memory as it
        is. Called outside of autocast.

        Args:
            state: the memory before the first segment, in fp32, or fp64 for a model in fp64.
            k, v: (B, N, H, S, D) in the precision of the model.
            write_mask: bool, broadcastable to (B, N, S): the tokens to write. None: all.
            memory_document: (B, N + 1) the document in the memory before each segment and after the last one, never
                decreasing; the memory has to be emptied where it changes. None: one document.
            parameters: of this layer, in the precision of the model.
        """

    def write_divided(
        self,
        state: StateT,
        k: Tensor,
        v: Tensor,
        write_mask: Tensor | None,
        memory_document: Tensor | None,
        parameters: Mapping[str, Tensor],
        group: SequenceGroup,
    ) -> tuple[StateT, StateT]:
        """Return the memory before each of this rank's n segments, and after the block that is divided over `group`.

        What `write` returns for the segments of all K ranks, of which each rank has n. This needs a rule that can tell
        what a rank's segments do to any memory without knowing that memory: `group.scan` and `group.prefix_sums`
        exchange that. A rule without this method is refused with a `sequence_group`.

        Args:
            state: the memory before the block.
            k, v, write_mask: of this rank's segments, as for `write`.
            memory_document: (B, K n + 1), of the segments of all ranks.
        """
        raise NotImplementedError(f"memory_rule={self.name!r} has no write_divided")

    @property
    def can_be_divided(self) -> bool:
        """Whether the segments of a row can be divided over ranks."""
        return type(self).write_divided is not MemoryRule.write_divided

    @abstractmethod
    def read(self, q: Tensor, before: StateT, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return what queries q (B, N, H, S, D) retrieve from the memory before their segment, in the same shape.

        Finite also where the memory is empty; `blend` then ignores the value.
        """

    @abstractmethod
    def flops_per_token(self, config: InfiniGPTNeoConfig) -> float:
        """Return the multiply-adds of one token's write and read in one layer, forward."""


class AssociativeRule(MemoryRule[MemoryState]):
    """A rule whose state is (M, z) and that reads by eq. (3)."""

    def features(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return phi of keys or queries (B, N, H, S, D), in fp32 or higher: non-negative, and never 0 in all of D."""
        return feature_map(x)

    def key_features(self, k: Tensor, write_mask: Tensor | None, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return phi(K), with 0 for tokens that are not written."""
        return written_features(self.features(k, parameters), write_mask)

    def empty_state(self, B: int, H: int, D: int, dtype: torch.dtype, device: torch.device | str | None) -> MemoryState:
        return MemoryState(
            torch.zeros(B, H, D, D, dtype=dtype, device=device), torch.zeros(B, H, D, dtype=dtype, device=device)
        )

    def read(self, q: Tensor, before: MemoryState, parameters: Mapping[str, Tensor]) -> Tensor:
        return retrieve(self.features(q, parameters), before)

    def flops_per_token(self, config: InfiniGPTNeoConfig) -> float:
        return 2 * config.hidden_size * config.head_dim  # phi(k)^T v and phi(q) M: H D D each


RULES: dict[str, MemoryRule] = {}


def register_memory_rule(rule: MemoryRule) -> None:
    """Make a rule available as `memory_rule=NAME`. A class that is defined again replaces itself.

    Raises:
        ValueError: another class has registered this name.
    """
    known, new = (f"{type(r).__module__}.{type(r).__qualname__}" for r in (RULES.get(rule.name, rule), rule))
    if known != new:
        raise ValueError(f"memory_rule={rule.name!r} of {new} is already registered by {known}: choose another name")
    RULES[rule.name] = rule


def get_memory_rule(name: str) -> MemoryRule:
    """Return the rule of this name.

    Raises:
        ValueError: it is unknown; the sentence lists the known ones.
    """
    if name not in RULES:
        raise ValueError(f"memory_rule={name!r} is not one of {', '.join(sorted(RULES))}")
    return RULES[name]


def state_tensors(state: State) -> dict[str, Tensor]:
    """Return the tensors of a state by name: a NamedTuple's fields, otherwise their positions."""
    names = getattr(state, "_fields", range(len(state)))
    return {str(name): tensor for name, tensor in zip(names, state, strict=True)}


def map_state(function: Callable[..., Tensor], state: StateT, *others: StateT) -> StateT:
    """Return the state of what `function` returns for each tensor of a state, or for those of several of one form.

    As `tree_map` does, in a fraction of its time, which counts for a single token.
    """
    return like_state(state, [function(*each) for each in zip(state, *others, strict=True)])
