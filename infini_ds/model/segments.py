"""Where each token of a batch lies: its segment, its document, what it may read from the memory and write to it.

Each row is a grid of N segments of S slots. Padding gets no slot, so a row with padding anywhere gives what its tokens
alone give. Shapes: B batch, T input tokens, N segments, S slots in a segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequence_parallel import SequenceGroup

NO_DOCUMENT = -1  # the document of a slot without a token, and of an empty memory


@dataclass(frozen=True)
class SegmentGrid:
    """The grid of a batch, or of a block of its segments. A None means that the plain case needs no mask.

    Attributes:
        N, S: segments a row, slots a segment.
        read_mask: bool, broadcastable to (B, N, S), or (B, N, T) if incremental: tokens whose own document is in the
            memory before their segment.
        slots: (B, T) the slot of each input token; N * S for padding. None: token t has slot t.
        documents: (B, N, S) the document of each slot, NO_DOCUMENT without a token. None: one document, no padding.
        memory_document: (B, N + 1) the document in the memory before each segment and after the last. Of a block that
            is divided over ranks: of all of its segments, not only of this rank's. None as above.
        write_mask: bool, broadcastable to (B, N, S): tokens that are written when their segment ends. None: all.
        cached_slots: bool (B, S), slots of the first segment whose tokens come from a cache. None: no cache, or not
            the first block.
        packed: a row may hold several documents. Otherwise causal attention needs no mask: tokens fill the slots from
            the first one on, and no token sees the slots after the last token.
        incremental: only the input tokens are computed, not all slots; N is 1, and a cache fills the other slots.
        memory_of: (B,) the row whose memory each row reads. None: its own.
        group: the ranks over which each block is divided, of which this one computes its span. None: this one alone.
    """

    N: int
    S: int
    read_mask: Tensor
    slots: Tensor | None = None
    documents: Tensor | None = None
    memory_document: Tensor | None = None
    write_mask: Tensor | None = None
    cached_slots: Tensor | None = None
    packed: bool = False
    incremental: bool = False
    memory_of: Tensor | None = None
    group: SequenceGroup | None = None

    def to_slots(self, values: Tensor, fill: int) -> Tensor:
        """Return (B, T, …) values of the input tokens in their slots, (B, N * S, …), and `fill` elsewhere."""
        return _to_slots(values, self.slots, self.N * self.S, fill)

    def from_slots(self, grid: Tensor, T: int) -> Tensor:
        """Return (B, N * S, …) values in the order of the T input tokens, (B, T, …); padding gets 0."""
        if self.slots is None or self.incremental:
            return grid[:, :T]
        grid = torch.cat([grid, torch.zeros_like(grid[:, :1])], dim=1)
        rows = torch.arange(grid.shape[0], device=grid.device)[:, None]
        return grid[rows, self.slots]

    def at_columns(self, columns: Tensor, computed: Tensor, slots: slice) -> Tensor:
        """Return the values (B, n, …) of n input tokens, `columns`, 0 for padding and for tokens of other blocks.

        Args:
            computed: (B, slots of a block, …), those of `slots` of all N * S slots.
        """
        index = columns[None] if self.slots is None or self.incremental else self.slots[:, columns]
        index = index - slots.start
        outside = (index < 0) | (index >= computed.shape[1])
        index = index.clamp(0, computed.shape[1] - 1).expand(len(computed), -1)
        rows = torch.arange(len(computed), device=index.device)[:, None]
        return computed[rows, index].masked_fill(outside[..., None], 0)

    def at_input_tokens(self, computed: Tensor) -> Tensor:
        """Return the values (B, T, …) of the input tokens of an incremental grid, from those of its slots (B, S, …)."""
        assert self.slots is not None
        rows = torch.arange(len(computed), device=computed.device)[:, None]
        return computed[rows, self.slots.clamp_max(self.S - 1)]

    def last_slots(self, count: int) -> Tensor:
        """Return the last `count` slots (B, count) of each row that hold a token; below 0, those before the grid."""
        assert self.documents is not None  # a grid after a cache has them
        filled = (self.documents.flatten(1) != NO_DOCUMENT).sum(1, keepdim=True)
        return filled + torch.arange(-count, 0, device=filled.device)

    def shift_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Return the label of the next token for each computed position, (B, N * S) or, if incremental, (B, T).

        `labels`: (B, T), of the input tokens.
        """
        following = F.pad(self.to_slots(labels, ignore_index)[:, 1:], (0, 1), value=ignore_index)
        if self.incremental:
            assert self.slots is not None
            return F.pad(following, (0, 1), value=ignore_index).gather(1, self.slots)
        if self.cached_slots is not None:  # tokens of the cache are not computed again
            following[:, : self.S].masked_fill_(self.cached_slots, ignore_index)
        return following

    def with_memory_of(self, memory_of: Tensor) -> "SegmentGrid":
        """Return the grid whose rows read the memories of rows `memory_of` (B,), where these hold anything."""
        if self.memory_document is None:  # all rows have the same masks
            return replace(self, memory_of=memory_of)
        written = self.memory_document[memory_of, :-1, None] != NO_DOCUMENT
        return replace(self, read_mask=self.read_mask & written, memory_of=memory_of)

    def positions(self, device: torch.device) -> Tensor:
        """Return the positions of the computed tokens in their segment: (S,) or, if incremental, (B, T)."""
        if self.incremental:
            assert self.slots is not None
            return self.slots.clamp_max(self.S - 1)
        return torch.arange(self.S, device=device)

    def local_mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Return which slots of its segment each token attends to; None for plain causal attention.

        Args:
            window: how many tokens back a token attends, itself included (GPT-Neo's "local" layers); None for all.
        Returns:
            bool: (B * N, 1, S, S), (1, 1, S, S) if all segments have the same mask, or (B, 1, T, S) if incremental.
        """
        if window is not None and window >= self.S:
            window = None
        by_document = self.packed or self.incremental
        if not by_document and window is None:
            return None
        position = self.positions(device)
        distance = position[..., :, None] - torch.arange(self.S, device=device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if not by_document:
            return mask[None, None]
        assert self.documents is not None
        keys = queries = self.documents
        if self.incremental:
            assert self.slots is not None
            queries = _at_input_tokens(keys, self.slots)
        # Slots without a token attend to each other: a row of the softmax without any key would be NaN.
        mask = (queries[..., :, None] == keys[..., None, :]) & mask.view(-1, 1, *mask.shape[-2:])
        if self.incremental:
            assert self.slots is not None
            mask = mask | (self.slots == self.S)[:, None, :, None]
        return mask.flatten(0, 1)[:, None]

    def join(self, of_blocks: Sequence[Tensor]) -> Tensor:
        """Return values of all computed tokens, (B, N * S, …), from those of each block that this rank computes."""
        joined = torch.cat(list(of_blocks), dim=1)
        return joined if self.group is None else self.group.join(joined, [x.shape[1] for x in of_blocks])

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of what each rank computes of its segments."""
        return values if self.group is None else self.group.sum(values)

    def split(self, segments_per_block: int | None) -> Iterator[tuple[int, "SegmentGrid"]]:
        """Yield (index of its first segment, grid) for each block of segments; None: one block.

        With a group, each rank has so many segments of a block, and the grid is that of this rank's span.
        """
        if self.incremental:
            yield 0, self
            return
        rank, K = (0, 1) if self.group is None else (self.group.rank, self.group.size)
        G = K * segments_per_block if segments_per_block else self.N
        for first in range(0, self.N, G):
            last = min(first + G, self.N)
            N = (last - first) // K
            span = slice(first + rank * N, first + (rank + 1) * N)
            block = replace(
                self,
                N=N,
                slots=None,
                documents=None if self.documents is None else self.documents[:, span],
                memory_document=None if self.memory_document is None else self.memory_document[:, first : last + 1],
                read_mask=self.read_mask[:, span],
                write_mask=None if self.write_mask is None else self.write_mask[:, span],
                cached_slots=self.cached_slots if first == 0 else None,
            )
            yield span.start, block


def build_grid(
    input_ids: Tensor,
    S: int,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    group: SequenceGroup | None = None,
) -> SegmentGrid:
    """Return the grid of rows that start with an empty memory.

    Args:
        input_ids: (B, T); S: segment length.
        attention_mask: (B, T), 0 for padding, which may be anywhere.
        document_ids: (B, T) integers from 0, never decreasing in a row.
        group: the ranks over which the rows are divided; rows get empty segments up to a multiple of their number.
    """
    B, T = input_ids.shape
    device = input_ids.device
    N = max(1, -(-T // S))
    if N == 1:
        S = max(1, T)  # a row of one segment needs no empty slots at its end
    if group is not None:
        N = -(-N // group.size) * group.size
    if attention_mask is None and document_ids is None:
        read_mask = torch.arange(N, device=device)[None, :, None] > 0
        write_mask = None if T == N * S else (torch.arange(N * S, device=device) < T).view(1, N, S)
        return SegmentGrid(N, S, read_mask=read_mask, write_mask=write_mask, group=group)
    packed = document_ids is not None
    if document_ids is None:
        document_ids = torch.zeros_like(input_ids)
    slots = None if attention_mask is None else token_slots(attention_mask.bool(), N * S)
    documents = _to_slots(document_ids, slots, N * S, NO_DOCUMENT).view(B, N, S)
    memory_document, read_mask, write_mask = document_masks(documents, documents.new_full((B,), NO_DOCUMENT))
    return SegmentGrid(N, S, read_mask, slots, documents, memory_document, write_mask, packed=packed, group=group)


def build_grid_after_cache(
    open_documents: Tensor,
    memory_document: Tensor,
    attention_mask: Tensor,
    document_ids: Tensor | None = None,
    packed: bool = False,
    N: int | None = None,
) -> tuple[SegmentGrid, Tensor]:
    """Return the grid of tokens that follow those in a cache: it starts with each row's open segment.

    Args:
        open_documents: (B, S) the document of each slot of the open segment, NO_DOCUMENT after its last token.
        memory_document: (B,) the document in the memory, NO_DOCUMENT if it is empty.
        attention_mask: (B, T), 0 for padding; document_ids: (B, T), or None if the last document continues.
        packed: the open segments may hold several documents.
        N: segments of the grid, if known. None: count them, for which the host waits for the device.
    Returns:
        The grid, and (B,) the index of the segment that is open afterwards: N where the row's last segment is full.
    """
    B, S = open_documents.shape
    valid = attention_mask.bool()
    cached_slots = open_documents != NO_DOCUMENT
    length = cached_slots.sum(1)
    total = length + valid.sum(1)
    if N is None:
        N = max(1, -(-int(total.max()) // S))
    packed = packed or document_ids is not None
    if document_ids is None:
        last_document = torch.maximum(memory_document, open_documents.amax(1)).clamp_min(0)
        document_ids = last_document[:, None].expand(valid.shape)
    slots = token_slots(valid, N * S, length[:, None])
    documents = _to_slots(document_ids, slots, N * S, NO_DOCUMENT).view(B, N, S)
    documents[:, 0] = torch.where(cached_slots, open_documents, documents[:, 0])
    open_segment = total // S
    closed = torch.arange(N, device=valid.device) < open_segment[:, None]
    memory_document, read_mask, write_mask = document_masks(documents, memory_document, closed)
    incremental = N == 1
    if incremental:
        read_mask = _at_input_tokens(read_mask, slots)
    grid = SegmentGrid(
        N, S, read_mask, slots, documents, memory_document, write_mask, cached_slots, packed, incremental
    )
    return grid, open_segment


def token_slots(valid: Tensor, size: int, first: Tensor | int = 0) -> Tensor:
    """Return the slots of the valid tokens (B, T), counted from `first` (an int or (B, 1)); `size` for padding."""
    return (first + valid.cumsum(1) - 1).masked_fill(~valid, size)


def document_masks(
    documents: Tensor, memory_document: Tensor, closed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a grid's memory_document (B, N + 1), read_mask and write_mask (B, N, S), which follow from the documents.

    Args:
        documents: (B, N, S); memory_document: (B,) the document in the memory before the first segment.
        closed: bool (B, N), the segments that are written in this call; None: all.
    """
    latest = documents.amax(-1)  # ids never decrease, so the largest is that of the last token
    if closed is not None:
        latest = latest.masked_fill(~closed, NO_DOCUMENT)
    memory_document = torch.cat([memory_document[:, None], latest], dim=1).cummax(1).values
    has_token = documents != NO_DOCUMENT
    read_mask = has_token & (documents == memory_document[:, :-1, None])
    write_mask = has_token & (documents == memory_document[:, 1:, None])
    if closed is not None:
        write_mask = write_mask & closed[:, :, None]
    return memory_document, read_mask, write_mask


def _to_slots(values: Tensor, slots: Tensor | None, size: int, fill: int) -> Tensor:
    if slots is None:
        return F.pad(values, (0, 0) * (values.ndim - 2) + (0, size - values.shape[1]), value=fill)
    grid = values.new_full((values.shape[0], size + 1, *values.shape[2:]), fill)  # the last slot takes the padding
    index = slots.view(*slots.shape, *(1,) * (values.ndim - 2)).expand_as(values)
    return grid.scatter(1, index, values)[:, :-1]


def _at_input_tokens(per_slot: Tensor, slots: Tensor) -> Tensor:
    """Return (B, 1, S) values of one segment's slots at the input tokens, (B, 1, T)."""
    return per_slot.gather(2, slots.clamp_max(per_slot.shape[2] - 1)[:, None])
