"""Where each token of a batch stands: its segment, its document, what it may read from the memory and write to it.

Tokens are laid out on a grid of N segments of S slots a row. Padding has no slot: a row with padding anywhere gives
what its tokens alone give. Shapes: B batch, T tokens given, N segments, S slots in a segment.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = -1  # the document of a slot without a token, and of a memory without content


@dataclass(frozen=True)
class SegmentGrid:
    """The grid of a batch, or a block of its segments. None stands for the plain case, which needs no mask.

    Attributes:
        N, S: segments a row, slots a segment.
        slots: (B, T) the slot of each token given; padding points behind the last one. None: token t is in slot t.
        documents: (B, N, S) the document of each slot, EMPTY without a token. None: one document, no padding.
        held: (B, N + 1) the document in the memory before each segment and after the last. None as for documents.
        read: bool, broadcastable to (B, N, S): tokens whose own document is in the memory before their segment.
        write: bool, broadcastable to (B, N, S): tokens that are written when their segment ends. None: all.
        from_cache: (B, S) slots of the first segment whose tokens came before. None: no cache, or not the first block.
        packed: a row may hold several documents. If not, causal attention is all that slots need: tokens fill them from
            the first one on, and those behind the last token are seen by no token.
        step: only the tokens given are computed, not all slots; N is 1 and the other slots come from a cache.
        memory_of: (B,) the row whose memory each row reads. None: its own.
    """

    N: int
    S: int
    slots: Tensor | None = None
    documents: Tensor | None = None
    held: Tensor | None = None
    read: Tensor | None = None
    write: Tensor | None = None
    from_cache: Tensor | None = None
    packed: bool = False
    step: bool = False
    memory_of: Tensor | None = None

    def place(self, values: Tensor, empty: int) -> Tensor:
        """(B, T) values of the tokens given -> (B, N * S) in their slots, `empty` elsewhere."""
        if self.slots is None:
            return F.pad(values, (0, self.N * self.S - values.shape[1]), value=empty)
        grid = values.new_full((values.shape[0], self.N * self.S + 1), empty)
        return grid.scatter_(1, self.slots, values)[:, :-1]

    def next_tokens(self, labels: Tensor, ignored: int) -> Tensor:
        """(B, T) labels -> for each place computed, (B, N * S) or in a step (B, T), the label of the token after it."""
        following = F.pad(self.place(labels, ignored)[:, 1:], (0, 1), value=ignored)
        if self.step:
            return F.pad(following, (0, 1), value=ignored).gather(1, self.slots)
        if self.from_cache is not None:  # tokens that came before are not computed again
            following[:, : self.S].masked_fill_(self.from_cache, ignored)
        return following

    def reading_from(self, memory_of: Tensor) -> "SegmentGrid":
        """The grid whose rows read the memories of the rows `memory_of` (B,), where anything has been written there."""
        if self.held is None:  # all rows are alike
            return replace(self, memory_of=memory_of)
        written = self.held[memory_of, :-1, None] != EMPTY
        return replace(self, read=self.read & written, memory_of=memory_of)

    def collect(self, grid: Tensor, T: int) -> Tensor:
        """(B, N * S, …) -> (B, T, …) in the order that the tokens were given in; padding gets 0."""
        if self.slots is None or self.step:
            return grid[:, :T]
        grid = torch.cat([grid, torch.zeros_like(grid[:, :1])], dim=1)
        rows = torch.arange(grid.shape[0], device=grid.device)[:, None]
        return grid[rows, self.slots]

    def positions(self, device: torch.device) -> Tensor:
        """Positions in their segment of the tokens computed: (S,), or (B, T) in a step."""
        return self.slots.clamp_max(self.S - 1) if self.step else torch.arange(self.S, device=device)

    def local_mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Which slots of its segment each token sees: bool (B * N, 1, S, S), (1, 1, S, S) if all segments are alike, or
        in a step (B, 1, T, S). None: plain causal attention.

        `window`: how many tokens back a token sees, itself included (GPT-Neo's "local" layers); None for all.
        """
        if window is not None and window >= self.S:
            window = None
        by_document = self.packed or self.step
        if not by_document and window is None:
            return None
        position = self.positions(device)
        distance = position[..., :, None] - torch.arange(self.S, device=device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if not by_document:
            return mask[None, None]
        keys = self.documents
        queries = self._of_step(keys) if self.step else keys
        # A slot without a token is equal to its like, so that its row of the softmax is not empty: no NaN.
        mask = (queries[..., :, None] == keys[..., None, :]) & mask.view(-1, 1, *mask.shape[-2:])
        if self.step:
            mask = mask | (self.slots == self.S)[:, None, :, None]
        return mask.flatten(0, 1)[:, None]

    def _of_step(self, per_slot: Tensor) -> Tensor:
        """(B, 1, S) -> (B, 1, T): what belongs to the tokens of a step."""
        return per_slot.gather(2, self.slots.clamp_max(self.S - 1)[:, None])

    def blocks(self, segments_per_block: int | None):
        """Yield (first segment, grid of this block's segments)."""
        G = segments_per_block or self.N
        for first in range(0, self.N, G):
            last = min(first + G, self.N)
            part = {
                "documents": None if self.documents is None else self.documents[:, first:last],
                "held": None if self.held is None else self.held[:, first : last + 1],
                "read": self.read[:, first:last],
                "write": None if self.write is None else self.write[:, first:last],
                "from_cache": self.from_cache if first == 0 else None,
            }
            yield first, self if self.step else replace(self, N=last - first, slots=None, **part)


def lay_out(
    input_ids: Tensor,
    S: int,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> SegmentGrid:
    """The grid of rows that start with an empty memory.

    Args:
        input_ids: (B, T); S: segment length.
        attention_mask: (B, T), 0 for padding, which may stand anywhere.
        document_ids: (B, T) integers from 0, never decreasing in a row.
    """
    B, T = input_ids.shape
    device = input_ids.device
    N = max(1, -(-T // S))
    if N == 1:
        S = max(1, T)  # a row of one segment needs no empty slots behind it
    if attention_mask is None and document_ids is None:
        read = torch.arange(N, device=device)[None, :, None] > 0
        write = None if T == N * S else (torch.arange(N * S, device=device) < T).view(1, N, S)
        return SegmentGrid(N, S, read=read, write=write)
    packed = document_ids is not None
    if document_ids is None:
        document_ids = torch.zeros_like(input_ids)
    slots = None if attention_mask is None else token_slots(attention_mask.bool(), N * S)
    grid = SegmentGrid(N, S, slots, packed=packed)
    documents = grid.place(document_ids, EMPTY).view(B, N, S)
    return with_documents(grid, documents, documents.new_full((B,), EMPTY))


def lay_out_after(
    open_documents: Tensor,
    held: Tensor,
    attention_mask: Tensor,
    document_ids: Tensor | None = None,
    packed: bool = False,
    N: int | None = None,
) -> tuple[SegmentGrid, Tensor]:
    """The grid of tokens that follow those in a cache: each row's open segment stands in front of them.

    Args:
        open_documents: (B, S) the documents of the open segment, EMPTY behind its last token.
        held: (B,) the document in the memory, EMPTY if none.
        attention_mask: (B, T), 0 for padding; document_ids: (B, T), or None where the last document goes on.
        packed: the open segments may hold several documents.
        N: segments of the grid, if known. None: to count them, the host waits for the device.
    Returns:
        The grid, and (B,) the segment of the grid that is open afterwards: N where the row's last one is full.
    """
    B, S = open_documents.shape
    valid = attention_mask.bool()
    from_cache = open_documents != EMPTY
    length = from_cache.sum(1)
    total = length + valid.sum(1)
    if N is None:
        N = max(1, -(-int(total.max()) // S))
    packed = packed or document_ids is not None
    if document_ids is None:
        document_ids = torch.maximum(held, open_documents.amax(1)).clamp_min(0)[:, None].expand(valid.shape)
    slots = token_slots(valid, N * S, length[:, None])
    grid = SegmentGrid(N, S, slots, from_cache=from_cache, packed=packed, step=N == 1)
    documents = grid.place(document_ids, EMPTY).view(B, N, S)
    documents[:, 0] = torch.where(from_cache, open_documents, documents[:, 0])
    still_open = total // S
    closed = torch.arange(N, device=valid.device) < still_open[:, None]
    return with_documents(grid, documents, held, closed), still_open


def token_slots(valid: Tensor, size: int, first: Tensor | int = 0) -> Tensor:
    """(B, T) slots of the valid tokens, counted from `first` (an int or (B, 1)); padding gets slot `size`."""
    return (first + valid.cumsum(1) - 1).masked_fill(~valid, size)


def with_documents(grid: SegmentGrid, documents: Tensor, held: Tensor, closed: Tensor | None = None) -> SegmentGrid:
    """The grid with what its tokens read and write, which follows from the documents.

    Args:
        documents: (B, N, S); held: (B,) the document in the memory before the first segment.
        closed: bool (B, N), the segments that are written now; None: all.
    """
    latest = documents.amax(-1)  # ids never decrease, so the greatest is that of the last token
    if closed is not None:
        latest = latest.masked_fill(~closed, EMPTY)
    held = torch.cat([held[:, None], latest], dim=1).cummax(1).values  # (B, N + 1)
    has_token = documents != EMPTY
    read = has_token & (documents == held[:, :-1, None])
    write = has_token & (documents == held[:, 1:, None])
    if closed is not None:
        write = write & closed[:, :, None]
    grid = replace(grid, documents=documents, held=held, write=write)
    return replace(grid, read=grid._of_step(read) if grid.step else read)
