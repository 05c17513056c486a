"""Decoding: new tokens that fit into every row's open segment are computed alone, in place in the cache.

Such a call needs no grid. Keys and values go into the cache, local attention sees the slots that are filled, and the
memory is read; it is written only where a row's segment is full afterwards. Rows that are equally far need no mask.
`fits` says where this is possible. Everywhere else, with gradients for example, the general path gives the same: the
grid of `segments.build_grid_after_cache`.

Shapes: B batch, T new tokens, K keys, H heads, S slots in a segment, D head size, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import InfiniCache, LayerCache
from .configuration import InfiniGPTNeoConfig
from .local_attention import rotary_angles
from .memory_rule import MemoryRule, State, map_state
from .segments import NO_DOCUMENT, document_masks

if TYPE_CHECKING:
    from .base_model import ForwardContext, InfiniGPTNeoModel, OutputT


@dataclass(frozen=True)
class FullSegments:
    """The rows whose segment is full after a step, and what is written of it.

    Attributes:
        rows: (b,) their indices; None: all rows.
        write_mask: bool (b, 1, S), memory_document: (b, 2), as `MemoryRule.write` gets them.
    """

    rows: Tensor | None
    write_mask: Tensor | None = None
    memory_document: Tensor | None = None


@dataclass(frozen=True)
class DecodingStep:
    """Where T new tokens of each row lie. None of them is padding.

    It stands in for a `SegmentGrid` of one segment, of which only the new tokens are computed.

    Attributes:
        T, S: new tokens of each row, slots of a segment.
        first: the slot of the first new token, if it is the same in all rows and none is packed; otherwise None.
        filled: slots that are filled afterwards in the row that has most.
        slots: (1, T) or, if rows differ, (B, T) the slot of each new token.
        read_mask: which tokens read the memory: all, none, or bool (B, 1, 1).
        full: what is to be written; None: no segment is full afterwards.
        memory_document: (B,) the document in the memory afterwards.
        documents: (B, S) the document of each slot if rows may be packed, those of full segments included. None: all
            tokens are of one document.
        angles: of rotary positions, cos and sin (1 or B, 1, T, D); None: there are none.
    """

    T: int
    S: int
    first: int | None
    filled: int
    slots: Tensor
    read_mask: Tensor | bool
    full: FullSegments | None
    memory_document: Tensor
    documents: Tensor | None
    angles: tuple[Tensor, Tensor] | None

    N = 1
    incremental = True

    @property
    def packed(self) -> bool:
        return self.documents is not None

    def positions(self, device: torch.device) -> Tensor:
        return self.slots

    def join(self, computed: Sequence[Tensor]) -> Tensor:
        return computed[0]

    def sum(self, values: Tensor) -> Tensor:
        return values

    def from_slots(self, computed: Tensor, T: int) -> Tensor:
        return computed

    def at_columns(self, columns: Tensor, computed: Tensor, slots: slice) -> Tensor:
        return computed if self.T == len(columns) == 1 else computed[:, columns]

    def shift_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Return the label of the next token for each new token, (B, T)."""
        return F.pad(labels[:, 1:], (0, 1), value=ignore_index)

    def keys(self, window: int | None) -> slice:
        """Return the slots that hold all keys that a layer with this window attends to."""
        first = 0
        if window is not None and self.first is not None and self.T == 1:
            first = max(0, self.filled - window)
        return slice(first, self.filled)

    def local_mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Return which of `keys` each new token attends to, bool (1 or B, 1, T, K); None: all."""
        if self.first is not None and self.T == 1:
            return None
        distance = self.slots[:, :, None] - torch.arange(self.filled, device=device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if self.documents is not None:
            own = self.documents.gather(1, self.slots)
            mask = mask & (own[:, :, None] == self.documents[:, None, : self.filled])
        return mask[:, None]

    def documents_afterwards(self) -> Tensor | None:
        """Return `documents` (B, S) of the segments that are open after the step, empty where one was full."""
        if self.documents is None or self.full is None:
            return self.documents
        assert self.full.rows is not None
        return self.documents.index_fill(0, self.full.rows, NO_DOCUMENT)

    def last_slots(self, slots: Tensor, width: int) -> Tensor:
        """Return the values (B, H, ≤ T + width - 1, D) of the new tokens and of up to width - 1 before them."""
        if self.first is not None:
            return slots[:, :, max(0, self.first - width + 1) : self.first + self.T]
        index = self._last_index(width).clamp_min(0)[:, None, :, None]
        return slots.gather(2, index.expand(-1, slots.shape[1], -1, slots.shape[3]))

    def last_documents(self, width: int) -> Tensor | None:
        """Return the documents of `last_slots`, NO_DOCUMENT before the segment; None: all are of one document."""
        if self.first is not None:
            return None
        index = self._last_index(width)
        documents = torch.zeros_like(index) if self.documents is None else self.documents.gather(1, index.clamp_min(0))
        return documents.masked_fill(index < 0, NO_DOCUMENT)

    def _last_index(self, width: int) -> Tensor:
        return self.slots[:, :1] + torch.arange(1 - width, self.T, device=self.slots.device)

    def put(self, new: Tensor, slots: Tensor) -> None:
        """Write keys or values of the new tokens (B, H, T, D) into those of all slots (B, H, S, D), in place."""
        if self.first is not None:
            slots[:, :, self.first : self.first + self.T] = new
        else:
            index = self.slots[:, None, :, None].expand_as(new)
            slots.scatter_(2, index, new.to(slots.dtype))


def fits(
    model: InfiniGPTNeoModel,
    cache: InfiniCache,
    tokens: Tensor,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    memory_of: Tensor | None,
) -> bool:
    """Return whether these tokens (B, T), which follow those in the cache, can be computed as a `DecodingStep`."""
    if document_ids is not None or memory_of is not None or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or model.h[0]._compiled_call_impl is not None:
        return False  # slices of changing length would be compiled again and again
    if not 0 < tokens.shape[1] <= cache.free_slots():
        return False
    return attention_mask is None or bool(attention_mask.all())


def plan_step(config: InfiniGPTNeoConfig, cache: InfiniCache, T: int, use_memory: bool) -> DecodingStep:
    """Return where T new tokens of each row lie after those in the cache."""
    S, tokens, before = cache.segment_length, cache.tokens(), cache.memory_document
    first = [count % S for count in tokens]
    alike = not cache.packed and all(slot == first[0] for slot in first)
    slots = torch.arange(first[0], first[0] + T, device=before.device)[None]
    if not alike:
        slots = slots + (torch.tensor(first, device=before.device) - first[0])[:, None]
    documents, angles = None, None
    read_mask: Tensor | bool = False
    if cache.packed:
        own = torch.maximum(before, cache.open_documents.amax(1)).clamp_min(0)
        documents = cache.open_documents.scatter(1, slots, own[:, None].expand_as(slots))
        read_mask = (before == own)[:, None, None]
    elif all(count >= S for count in tokens):
        read_mask = True
    elif any(count >= S for count in tokens):
        read_mask = (before != NO_DOCUMENT)[:, None, None]
    if config.position_embedding == "rotary":
        angles = rotary_angles(slots[:, None], config.head_dim, config.rotary_base)
    full, memory_document = _full_segments([slot + T == S for slot in first], documents, before)
    return DecodingStep(
        T=T,
        S=S,
        first=first[0] if alike else None,
        filled=max(first) + T,
        slots=slots,
        read_mask=read_mask if use_memory else False,
        full=full,
        memory_document=memory_document,
        documents=documents,
        angles=angles,
    )


def _full_segments(is_full: list[bool], documents: Tensor | None, before: Tensor) -> tuple[FullSegments | None, Tensor]:
    """Return what is written, and the document in the memory afterwards (B,).

    Args:
        documents: (B, S) of the slots, or None for one document; before: (B,) in the memory.
    """
    if not any(is_full):
        return None, before
    rows = None
    if not all(is_full):
        rows = torch.tensor([row for row, full in enumerate(is_full) if full], device=before.device)
    if documents is None:
        return FullSegments(rows), torch.zeros_like(before) if rows is None else before.index_fill(0, rows, 0)
    if rows is None:
        rows = torch.arange(len(is_full), device=before.device)
    memory_document, _, write_mask = document_masks(documents[rows, None], before[rows])
    after = before.index_copy(0, rows, memory_document[:, -1])
    return FullSegments(rows, write_mask, memory_document), after


def write_full_segments(
    rule: MemoryRule, state: State, k: Tensor, v: Tensor, full: FullSegments, parameters: Mapping[str, Tensor]
) -> State:
    """Return the memory after the full segments, whose k and v are among those of all rows, (B, H, S, D)."""
    rows = full.rows
    if rows is None:
        return rule.write(state, k[:, None], v[:, None], full.write_mask, full.memory_document, parameters)[1]
    some = map_state(lambda x: x[rows], state)
    _, after = rule.write(some, k[rows, None], v[rows, None], full.write_mask, full.memory_document, parameters)
    return map_state(lambda of_all, of_some: of_all.index_copy(0, rows, of_some), state, after)


def run_step(
    model: InfiniGPTNeoModel,
    context: ForwardContext,
    output: Callable[[Tensor, slice], OutputT],
    output_hidden_states: bool,
) -> tuple[list[OutputT], tuple[State, ...], tuple[Tensor, ...] | None]:
    """Run all layers and then `output` on the new tokens, and move the cache on; `InfiniGPTNeoModel.run_blocks`."""
    step, cache = context.grid, context.cache
    assert isinstance(step, DecodingStep) and cache is not None
    layer_caches = cast(list[LayerCache | None], cache.layer_caches)
    embeds = model.wte(context.input_ids) if context.inputs_embeds is None else context.inputs_embeds
    if model.embed_conv is not None:
        with_earlier = torch.cat([cache.last_embeds.to(embeds.dtype), embeds], dim=1)
        embeds = model.embed_conv(with_earlier)
        cache.last_embeds = with_earlier[:, step.T :].to(cache.last_embeds.dtype)
    hidden_states, states, _ = model.forward_block(embeds, context.states, step, layer_caches, output_hidden_states)
    cache.advance_step(states, step, context.input_ids if context.inputs_embeds is None else None)
    kept = tuple(hidden_states) if output_hidden_states else None
    return [output(hidden_states[-1], slice(0, step.T))], states, kept
