"""The cache of generation, of constant size: the memory of all closed segments, and the tokens of the open segment.

Shapes: B batch, H heads, S slots in a segment, D head size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_file import load_cache, save_cache
from .configuration import InfiniGPTNeoConfig
from .embedding_conv import EarlierTokens
from .memory import memory_dtype
from .memory_rule import State, get_memory_rule
from .segments import NO_DOCUMENT, SegmentGrid

if TYPE_CHECKING:
    from .decoding import DecodingStep

# transformers 5.24 renamed the argument and the field of outputs; `generate()` finds the cache by this name alone.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
FIRST_IDS = 16  # of a row that a cache keeps, to tell a changed prompt from new text
_BASE = 6364136223846793005  # of the polynomial that hashes token ids (Knuth's multiplier)


def _power(exponent: int) -> int:
    """Return _BASE to this power as int64, with overflow."""
    power = pow(_BASE, exponent, 1 << 64)
    return power - (1 << 64) if power >= 1 << 63 else power


def _hash_after(start: Tensor, ids: Tensor) -> Tensor:
    """Return the hashes (B,) of rows of ids (B, T) that continue rows with the hashes `start` (B,).

    With h after a token = h before * _BASE + id + 1, the hash of a row's end follows from the row's and its start's.
    """
    ids = ids.long()
    if ids.shape[1] == 1:
        return start * _BASE + (ids[:, 0] + 1)
    powers = torch.full_like(ids[0], _BASE).cumprod(0)
    powers = torch.cat([torch.ones_like(powers[:1]), powers[:-1]]).flip(0)
    return start * _power(ids.shape[1]) + ((ids + 1) * powers).sum(1)


def _fingerprint(config: InfiniGPTNeoConfig, dtype: torch.dtype) -> dict[str, object]:
    names = "segment_length", "num_layers", "num_heads", "head_dim", "memory_rule", "position_embedding"
    convolutions = "short_conv", "embed_conv"
    return {name: getattr(config, name) for name in (*names, *convolutions)} | {"dtype": dtype}


@dataclass
class LayerCache:
    """One layer's memory, and keys and values of each row's open segment, (B, H, S, D), as they were projected: neither
    convolved nor rotated.

    Attributes:
        attended_k, attended_v: convolved and rotated, as local attention uses them; decoding keeps them where they are
            not k and v themselves. None: not computed since k and v were last replaced.
        owned: no one else holds k and v, so that decoding may write to them in place. It makes copies otherwise.
    """

    memory: State
    k: Tensor
    v: Tensor
    attended_k: Tensor | None = None
    attended_v: Tensor | None = None
    owned: bool = False

    def replace_open_segment(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v, self.owned = k, v, False
        self.attended_k = self.attended_v = None

    def take_ownership(self) -> None:
        """Copy k and v if they are shared, a part of autograd's graph, or not writable outside of inference mode."""
        if not self.owned or (self.k.is_inference() and not torch.is_inference_mode_enabled()):
            self.replace_open_segment(self.k.detach().clone(), self.v.detach().clone())
            self.owned = True


class InfiniCache(Cache):
    """The state that `generate()` passes from token to token. Each row has its own open segment, so that prompts of
    different lengths in one batch give what each gives alone. Memory and time for a token do not depend on how many
    tokens came before.

    Attributes:
        layer_caches: one `LayerCache` a layer.
        open_documents: (B, S) the document of each slot of the open segment, NO_DOCUMENT after its last token.
        memory_document: (B,) the document in the memory, NO_DOCUMENT while nothing has been written.
        last_embeds: (B, embed_conv - 1, E) of the last tokens of the last document, before the convolution; 0 where
            it has fewer. (B, 0, E) without a convolution of embeddings.
        columns: number of columns of `input_ids` processed so far, padding included.
        packed: the open segments may hold several documents.
        fingerprint: what decides the shapes and the meaning of the tensors, by name.
        offset: the column at which the token ids of the present `generate()` begin; 0 unless it was given a question
            alone, after the text in the cache.
    """

    def __init__(self, config: InfiniGPTNeoConfig, batch_size: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__(layers=[])
        B, H, S, D = batch_size, config.num_heads, config.segment_length, config.head_dim
        open_segment = torch.zeros(B, H, S, D, dtype=dtype, device=device)
        self.rule = get_memory_rule(config.memory_rule)
        empty = self.rule.empty_state(B, H, D, memory_dtype(dtype), device)
        self.layer_caches = [LayerCache(empty, open_segment, open_segment) for _ in range(config.num_layers)]
        self.segment_length = S
        self.last_embeds = torch.zeros(B, max(0, config.embed_conv - 1), config.hidden_size, dtype=dtype, device=device)
        self.memory_document = torch.full((B,), NO_DOCUMENT, device=device)
        self._open_documents: Tensor | None = torch.full((B, S), NO_DOCUMENT, device=device)
        self._tokens: list[int] | None = None
        self.fingerprint = _fingerprint(config, dtype)
        self.columns = 0
        self.packed = False
        self._forget_ids()

    @property
    def open_documents(self) -> Tensor:
        if self._open_documents is None:  # since the last decoding step, and no row is packed: all tokens are of one
            assert self._tokens is not None
            filled = torch.tensor(self._tokens, device=self.memory_document.device)[:, None] % self.segment_length
            slots = torch.arange(self.segment_length, device=filled.device)
            self._open_documents = torch.where(slots < filled, 0, NO_DOCUMENT)
        return self._open_documents

    @open_documents.setter
    def open_documents(self, documents: Tensor) -> None:
        self._open_documents, self._tokens = documents, None

    def tokens(self) -> list[int]:
        """Return how many tokens each row holds, modulo the segment length, and plus it once the memory is written.

        The host keeps these numbers, so that it need not wait for the device to count them at each step of decoding.
        """
        if self._tokens is None:
            filled = (self.open_documents != NO_DOCUMENT).sum(1)
            self._tokens = (filled + self.segment_length * (self.memory_document != NO_DOCUMENT)).tolist()
        return self._tokens

    def earlier_tokens(self) -> EarlierTokens | None:
        """Return what a convolution of embeddings needs of the tokens so far; None if the model has none."""
        if not self.last_embeds.shape[1]:
            return None
        document = torch.maximum(self.memory_document, self.open_documents.amax(1))
        return EarlierTokens(self.last_embeds, document, (self.open_documents != NO_DOCUMENT).sum(1))

    def memories(self) -> tuple[State, ...]:
        return tuple(layer.memory for layer in self.layer_caches)

    def free_slots(self) -> int:
        """Return how many tokens certainly fit into every row's open segment."""
        return self.segment_length - max(tokens % self.segment_length for tokens in self.tokens())

    def _forget_ids(self) -> None:
        self.offset = 0
        self.first_ids = self.open_documents.new_zeros(len(self.memory_document), 0)
        self.ids_hash: Tensor | None = torch.zeros_like(self.memory_document)  # (B,); None where ids were not given
        self.offset_hash: Tensor | None = self.ids_hash

    def check(self, config: InfiniGPTNeoConfig, batch_size: int, dtype: torch.dtype) -> None:
        """Raise a ValueError if this is not a cache of such a model and batch."""
        for name, value in _fingerprint(config, dtype).items():
            if self.fingerprint[name] != value:
                raise ValueError(
                    f"past_key_values is the cache of a model with {name}={self.fingerprint[name]}, and this model has "
                    f"{name}={value}: pass a cache that this model returned"
                )
        if len(self.memory_document) != batch_size:
            raise ValueError(
                f"past_key_values holds {len(self.memory_document)} rows, and the input has {batch_size}: repeat the "
                "cache's rows with batch_repeat_interleave, or choose some with batch_select_indices"
            )

    def begin_generation(self, ids: Tensor) -> None:
        """Find out which tokens of a prompt (B, T) the cache has not read, and set `offset` accordingly.

        A prompt that begins with all tokens in the cache, as transformers passes it, continues after these. Any other
        one is new text as a whole.

        Raises:
            ValueError: the prompt can be meant either way, or has no new token.
        """
        hint = "pass all tokens in the cache and then new ones, or new ones alone"
        for start, start_hash in ((self.offset, self.offset_hash), (0, torch.zeros_like(self.memory_document))):
            done = self.columns - start
            if done == 0 or ids.shape[1] < done:
                continue
            if self.ids_hash is None or start_hash is None:
                raise ValueError(
                    f"a prompt of {ids.shape[1]} tokens after a cache of {done} columns that were given as embeddings: "
                    "it cannot be told which tokens are new; read new ones with forward(), or pass fewer at a time"
                )
            same = _hash_after(torch.zeros_like(start_hash), ids[:, :done].to(start_hash.device)) == (
                self.ids_hash - start_hash * _power(done)
            )
            if bool(same.all()):
                if ids.shape[1] == done:
                    raise ValueError(f"the cache holds all {done} tokens of the prompt already: {hint}")
                self.offset = start
                return
            known = self.first_ids.shape[1]
            similar = start == 0 and done > known and bool((ids[:, :known] == self.first_ids).all())
            if bool(same.any()) or similar:
                raise ValueError(f"the prompt begins like the text in the cache, and then differs from it: {hint}")
        self.offset, self.offset_hash = self.columns, self.ids_hash

    def save(self, path: str | Path, model: PreTrainedModel) -> None:
        """Write the cache to a file, atomically, with a hash of the weights of the model that it is a cache of."""
        save_cache(self, path, model)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> InfiniCache:
        """Return the cache in a file, on the model's device.

        Raises:
            ValueError: the file is damaged or not a cache, or the cache of another model or other weights.
        """
        return load_cache(cls, path, model)

    def copy(self) -> InfiniCache:
        """Return an independent copy: each of several continuations of one text begins with its own."""

        def cloned(values: dict) -> dict:
            return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, values)

        branch = copy.copy(self)
        vars(branch).update(cloned(vars(self)))
        branch.layer_caches = [replace(layer, **cloned(vars(layer))) for layer in self.layer_caches]
        return branch

    def store_open_segments(self, keys_values: list[tuple[Tensor, Tensor]], open_segment: Tensor) -> None:
        """Store the keys and values of each row's open segment, if it is one of these segments.

        Args:
            keys_values: for each layer k and v (B, N, H, S, D) of N segments.
            open_segment: (B,) the index of the open segment among these; rows where it is out of range are unchanged.
        """
        N = keys_values[0][0].shape[1]
        in_range = ((open_segment >= 0) & (open_segment < N))[:, None, None, None]
        index = open_segment.clamp(0, N - 1)
        rows = torch.arange(len(index), device=index.device)
        for layer, (k, v) in zip(self.layer_caches, keys_values, strict=True):
            layer.replace_open_segment(
                torch.where(in_range, k[rows, index].to(layer.k.dtype), layer.k),
                torch.where(in_range, v[rows, index].to(layer.v.dtype), layer.v),
            )

    def advance(
        self, states: tuple[State, ...], grid: SegmentGrid, open_segment: Tensor, columns: int, ids: Tensor | None
    ) -> None:
        """Move on to the end of `grid`, whose segment `open_segment` (B,) is the one that is not full in each row.

        Args:
            ids: (B, columns) the tokens that were read, None if they were given as embeddings.
        """
        self._count_columns(columns, ids)
        for layer, memory in zip(self.layer_caches, states, strict=True):
            layer.memory = memory
        assert grid.documents is not None and grid.memory_document is not None  # a grid after a cache has both
        empty_segment = torch.full_like(grid.documents[:, :1], NO_DOCUMENT)
        rows = torch.arange(len(open_segment), device=open_segment.device)
        self.open_documents = torch.cat([grid.documents, empty_segment], dim=1)[rows, open_segment]
        self.memory_document = grid.memory_document[:, -1].clone()  # without those before all other segments
        self.packed = grid.packed

    def advance_step(self, states: tuple[State, ...], step: DecodingStep, ids: Tensor | None) -> None:
        """Move on to the end of a decoding step, whose keys and values the layers have put into the cache.

        Args:
            ids: (B, T) the tokens that were read, None if they were given as embeddings.
        """
        tokens = [count + step.T for count in self.tokens()]
        self._count_columns(step.T, ids)
        for layer, memory in zip(self.layer_caches, states, strict=True):
            layer.memory = memory
        self.memory_document = step.memory_document
        self._open_documents, self._tokens = step.documents_afterwards(), tokens

    def _count_columns(self, columns: int, ids: Tensor | None) -> None:
        if ids is None or self.ids_hash is None:
            self.ids_hash = None
        else:
            if self.columns < FIRST_IDS:
                self.first_ids = torch.cat([self.first_ids, ids[:, : FIRST_IDS - self.columns]], dim=1)
            self.ids_hash = _hash_after(self.ids_hash, ids)
        self.columns += columns

    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        tensors = [self.open_documents, self.memory_document, self.last_embeds]
        for layer in self.layer_caches:
            tensors += [*tree_leaves(layer.memory), layer.k, layer.v]
            tensors += [x for x in (layer.attended_k, layer.attended_v) if x is not None]
        return sum(x.numel() * x.element_size() for x in tensors)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns - self.offset

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1  # unlimited

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows listed in `index`, in its order; a row may be listed more than once."""
        index = index.to(self.memory_document.device)
        tokens = self.tokens()
        alike = all(count == tokens[0] for count in tokens)  # then the host need not know the index
        tokens = tokens[:1] * len(index) if alike else [tokens[row] for row in index.tolist()]
        self.open_documents, self.memory_document = self.open_documents[index], self.memory_document[index]
        self.last_embeds = self.last_embeds[index]
        self._tokens = tokens
        self.first_ids = self.first_ids[index]
        self.ids_hash, self.offset_hash = (x if x is None else x[index] for x in (self.ids_hash, self.offset_hash))
        for layer in self.layer_caches:
            layer.memory = tree_map(lambda x: x[index], layer.memory)
            attended = layer.attended_k, layer.attended_v
            layer.replace_open_segment(layer.k[index], layer.v[index])
            layer.owned = not layer.k.requires_grad
            layer.attended_k, layer.attended_v = (x if x is None else x[index] for x in attended)

    reorder_cache = select_rows  # type: ignore[assignment]  # transformers' name for it in beam search
    batch_select_indices = select_rows  # type: ignore[assignment]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(len(self.memory_document)).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        raise ValueError(
            "a compressive memory cannot forget its last tokens, so generation that takes tokens back (assisted "
            "generation, prompt lookup) is not possible: generate without an assistant"
        )

    def reset(self) -> None:
        """Empty the cache in place."""
        self.open_documents = torch.full_like(self.open_documents, NO_DOCUMENT)
        self.memory_document = torch.full_like(self.memory_document, NO_DOCUMENT)
        self.last_embeds = torch.zeros_like(self.last_embeds)
        self.columns = 0
        self.packed = False
        self._forget_ids()
        for layer in self.layer_caches:
            B, H, _, D = layer.k.shape
            layer.memory = self.rule.empty_state(B, H, D, memory_dtype(layer.k.dtype), layer.k.device)


def check_cache(cache: object, config: InfiniGPTNeoConfig, batch_size: int, dtype: torch.dtype) -> None:
    """Raise a ValueError if this is not an `InfiniCache` of such a model and batch."""
    if not isinstance(cache, InfiniCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which holds keys and values of all tokens, and this "
            "model keeps an InfiniCache: leave past_key_values away, or pass the one that this model returned"
        )
    cache.check(config, batch_size, dtype)
