"""The state of generation, of constant size: the memory of all closed segments and the tokens of the open one.

Shapes: B batch, H heads, S tokens in a segment, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache

from .memory import memory_dtype
from .memory_rule import State, get_memory_rule
from .segments import EMPTY, SegmentGrid


@dataclass
class LayerState:
    """One layer's memory, and keys and values (without rotary phase) of each row's open segment, (B, H, S, D)."""

    memory: State
    k: Tensor
    v: Tensor


class InfiniCache(Cache):
    """What `generate()` carries from token to token. Each row has its own open segment, so that prompts of different
    lengths in one batch give what each gives alone. Memory and time for a token do not depend on how many came before.

    Attributes:
        layer_states: one `LayerState` a layer.
        documents: (B, S) the document of each slot of the open segment, EMPTY behind its last token.
        held: (B,) the document in the memory, EMPTY while nothing has been written.
        columns: how many columns of `input_ids` have been processed, padding included.
        packed: the open segments may hold several documents.
        room: tokens that fit into every row's open segment for certain. While a call's do, the host need not ask the
            device, and wait for it, how many segments there are.
    """

    def __init__(self, config, batch_size: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__(layers=[])
        B, H, S, D = batch_size, config.num_heads, config.segment_length, config.head_dim
        open_segment = torch.zeros(B, H, S, D, dtype=dtype, device=device)
        self.rule = get_memory_rule(config.memory_rule)
        empty = self.rule.empty_state(B, H, D, memory_dtype(dtype), device)
        self.layer_states = [LayerState(empty, open_segment, open_segment) for _ in range(config.num_layers)]
        self.documents = torch.full((B, S), EMPTY, device=device)
        self.held = torch.full((B,), EMPTY, device=device)
        self.columns = 0
        self.packed = False
        self.room = S

    def keep_open(self, keys_values: list[tuple[Tensor, Tensor]], still_open: Tensor) -> None:
        """Keep each row's open segment, where it is one of these.

        Args:
            keys_values: for each layer k and v (B, N, H, S, D) of N segments.
            still_open: (B,) which of them is open; rows where it is none of them are left as they are.
        """
        N = keys_values[0][0].shape[1]
        here = ((still_open >= 0) & (still_open < N))[:, None, None, None]
        index = still_open.clamp(0, N - 1)
        rows = torch.arange(len(index), device=index.device)
        for state, (k, v) in zip(self.layer_states, keys_values, strict=True):
            state.k = torch.where(here, k[rows, index].to(state.k.dtype), state.k)
            state.v = torch.where(here, v[rows, index].to(state.v.dtype), state.v)

    def advance(self, states: tuple[State, ...], grid: SegmentGrid, still_open: Tensor, columns: int) -> None:
        """Go on behind the tokens of `grid`, of which segment `still_open` (B,) of each row is not full."""
        for layer, memory in zip(self.layer_states, states, strict=True):
            layer.memory = memory
        none_open = torch.full_like(grid.documents[:, :1], EMPTY)
        rows = torch.arange(len(still_open), device=still_open.device)
        self.documents = torch.cat([grid.documents, none_open], dim=1)[rows, still_open]
        self.held = grid.held[:, -1]
        self.columns += columns
        self.packed = grid.packed
        self.room -= columns
        if self.room < 0:
            self.room = grid.S - int((self.documents != EMPTY).sum(1).max())

    def nbytes(self) -> int:
        """Of all its tensors."""
        tensors = [self.documents, self.held]
        for layer in self.layer_states:
            tensors += [*tree_leaves(layer.memory), layer.k, layer.v]
        return sum(x.numel() * x.element_size() for x in tensors)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1  # without limit

    @property
    def is_compileable(self) -> bool:
        return False

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows named by `index` (…), in its order; a row may be named more than once."""
        index = index.to(self.held.device)
        self.documents, self.held = self.documents[index], self.held[index]
        for state in self.layer_states:
            state.memory = tree_map(lambda x: x[index], state.memory)
            state.k, state.v = state.k[index], state.v[index]

    reorder_cache = select_rows  # beam search
    batch_select_indices = select_rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(len(self.held)).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        raise ValueError(
            "a compressive memory cannot forget its last tokens, so generation that takes tokens back (assisted "
            "generation, prompt lookup) is not possible: generate without an assistant"
        )

    def reset(self) -> None:
        self.documents.fill_(EMPTY)
        self.held.fill_(EMPTY)
        self.columns = 0
        self.packed = False
        self.room = self.documents.shape[1]
        for state in self.layer_states:
            B, H, _, D = state.k.shape
            state.memory = self.rule.empty_state(B, H, D, memory_dtype(state.k.dtype), state.k.device)
