"""A short causal convolution of the token embeddings, across the ends of segments.

Local attention, positions and the convolution of keys and values start again with each segment, so the first tokens of
one know nothing of the tokens before: a fact that the end of a segment cuts is lost. Here every token gets a learned
sum of the last w embeddings of its document, wherever segments end. Only w - 1 embeddings pass from one call to the
next, and none from rank to rank, since all ranks have the tokens of the complete row.

Shapes: B batch, T tokens, E width, N segments, S slots in a segment, w width of the convolution, n slots.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import InfiniGPTNeoConfig
from .segments import NO_DOCUMENT, SegmentGrid
from .short_conv import fill_taps, short_convolution


class EmbeddingConvolution(nn.Module):
    """x_t becomes sum_j c_j x_{t-j}, 0 <= j < w, per channel. Tokens that the document does not have count as 0."""

    def __init__(self, config: InfiniGPTNeoConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.embed_conv, config.hidden_size))  # (w, E), c_0 first
        self.start()

    def start(self) -> None:
        """Set c_0 to 1 and draw the others, so that a new model can tell where a token stands (docs/results.md)."""
        fill_taps(self.weight, 1.0, 0.0, std=len(self.weight) ** -0.5)

    def start_as_identity(self) -> None:
        """Set c_0 to 1 and all others to 0, with which a model that was trained without stays what it is."""
        fill_taps(self.weight, 1.0, 0.0)

    def forward(self, embeds: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the convolved embeddings (B, n, E).

        Args:
            embeds: (B, w - 1 + n, E), those of the w - 1 slots before first.
            documents: (B, w - 1 + n) the document of each slot, where a row may hold several.
        """
        per_slot = None if documents is None else documents[:, None]
        convolved = short_convolution(embeds[:, None, None], self.weight, per_slot)
        return convolved[:, 0, 0, len(self.weight) - 1 :]


@dataclass(frozen=True)
class EarlierTokens:
    """The last w - 1 tokens before those of a call, as a cache has them.

    Attributes:
        embeds: (B, w - 1, E), 0 where the row has no such token of its last document.
        document: (B,) that last document, NO_DOCUMENT in a row without tokens.
        filled: (B,) the slot of the grid that follows the last token.
    """

    embeds: Tensor
    document: Tensor
    filled: Tensor

    def insert(self, embeds: Tensor, slots: Tensor) -> Tensor:
        """Return embeddings (B, n, E) of `slots`, (n,) or (B, n), with the earlier tokens in their places."""
        index = slots - self.filled[:, None] + self.embeds.shape[1]
        known = (index >= 0) & (index < self.embeds.shape[1])
        index = index.clamp(0, self.embeds.shape[1] - 1)[..., None].expand(-1, -1, embeds.shape[-1])
        return torch.where(known[..., None], self.embeds.gather(1, index).to(embeds.dtype), embeds)

    def documents(self, of_slots: Tensor, slots: Tensor) -> Tensor:
        """Return the documents (B, n) of `slots` as above, those before the grid included; of_slots: (B, N * S)."""
        index = slots.expand(len(of_slots), -1).clamp_min(0)
        return torch.where(slots < 0, self.document[:, None], of_slots.gather(1, index))


class EmbeddedRows:
    """The embeddings of rows, from token ids or as they were given, in the order in which the layers compute them.

    Without a convolution these are the embeddings of the tokens alone.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        convolution: EmbeddingConvolution | None,
        ids: Tensor,
        inputs_embeds: Tensor | None,
        grid: SegmentGrid,
        earlier: EarlierTokens | None,
    ):
        """Args:
        ids: (B, T); inputs_embeds: (B, T, E), in place of the embeddings of ids, or None.
        grid: of the complete rows; earlier: of the cache, None without one or without a convolution.
        """
        self.embedding, self.convolution, self.grid, self.earlier = embedding, convolution, grid, earlier
        self.reach = 0 if convolution is None else len(convolution.weight) - 1
        by_token = grid.incremental and convolution is None
        self.ids = ids if by_token else grid.to_slots(ids, 0)  # (B, N * S)
        self.embeds = inputs_embeds
        if inputs_embeds is not None and not by_token:
            self.embeds = grid.to_slots(inputs_embeds, 0)

    def given(self, slots: slice) -> Tensor | None:
        """Return what a block of segments needs of the embeddings that were given; None: ids were given."""
        return None if self.embeds is None else self.embeds[:, self._needed(slots)]

    def of_block(self, slots: slice, given: Tensor | None) -> Tensor:
        """Return (B, n, E) for `slots`, or for the input tokens if the grid is incremental; given: of `given`."""
        needed, grid = self._needed(slots), self.grid
        embeds: Tensor = self.embedding(self.ids[:, needed]) if given is None else given
        if self.convolution is None:
            return embeds
        missing = self.reach if grid.incremental else self.reach - (slots.start - needed.start)
        embeds = F.pad(embeds, (0, 0, missing, 0))
        index = torch.arange(needed.start - missing, needed.stop, device=embeds.device)
        if self.earlier is not None:
            embeds = self.earlier.insert(embeds, index)
        documents = None
        if grid.packed:
            assert grid.documents is not None
            documents = grid.documents.flatten(1)
            if self.earlier is not None:
                documents = self.earlier.documents(documents, index)
            else:
                documents = F.pad(documents[:, needed], (missing, 0), value=NO_DOCUMENT)
        convolved: Tensor = self.convolution(embeds, documents)
        return grid.at_input_tokens(convolved) if grid.incremental else convolved

    def last(self) -> Tensor:
        """Return what `EarlierTokens.embeds` is after the call. Only with `earlier`."""
        assert self.earlier is not None
        slots = self.grid.last_slots(self.reach)
        rows, at = torch.arange(len(slots), device=slots.device)[:, None], slots.clamp_min(0)
        embeds = self.embedding(self.ids[rows, at]) if self.embeds is None else self.embeds[rows, at]
        embeds = self.earlier.insert(embeds, slots)
        if self.grid.packed:
            assert self.grid.documents is not None
            documents = self.earlier.documents(self.grid.documents.flatten(1), slots)
            embeds = embeds * (documents == documents[:, -1:])[..., None]
        return embeds

    def _needed(self, slots: slice) -> slice:
        """Return the slots whose embeddings those of `slots` depend on."""
        if self.grid.incremental and self.convolution is not None:
            return slice(0, self.grid.S)
        return slice(max(0, slots.start - self.reach), slots.stop)
