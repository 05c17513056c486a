"""The cache of generation, of constant size: the memory of all closed segments, and the tokens of the open segment.

Shapes: B batch, H heads, S slots in a segment, D head size.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_file import load_cache, save_cache
from .configuration import InfiniGPTNeoConfig
from .memory import memory_dtype
from .memory_rule import State, get_memory_rule
from .segments import NO_DOCUMENT, SegmentGrid

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
    names = (
        *("segment_length", "num_layers", "num_heads", "head_dim", "memory_rule", "position_embedding", "short_conv"),
    )
    return {name: getattr(config, name) for name in names} | {"dtype": dtype}


@dataclass
class LayerCache:
    """One layer's memory, and keys and values of each row's open segment, (B, H, S, D), as they were projected: neither
    convolved nor rotated.
    """

    memory: State
    k: Tensor
    v: Tensor


class InfiniCache(Cache):
    """The state that `generate()` passes from token to token. Each row has its own open segment, so that prompts of
    different lengths in one batch give what each gives alone. Memory and time for a token do not depend on how many
    tokens came before.

    Attributes:
        layer_caches: one `LayerCache` a layer.
        open_documents: (B, S) the document of each slot of the open segment, NO_DOCUMENT after its last token.
        memory_document: (B,) the document in the memory, NO_DOCUMENT while nothing has been written.
        columns: number of columns of `input_ids` processed so far, padding included.
        packed: the open segments may hold several documents.
        fingerprint: what decides the shapes and the meaning of the tensors, by name.
        offset: the column at which the token ids of the present `generate()` begin; 0 unless it was given a question
            alone, after the text in the cache.
        min_free_slots: a lower bound of the free slots in every row's open segment. While the tokens of a call fit into
            it, the number of segments is known to be 1, and the host need not wait for the device to count them.
    """

    def __init__(self, config: InfiniGPTNeoConfig, batch_size: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__(layers=[])
        B, H, S, D = batch_size, config.num_heads, config.segment_length, config.head_dim
        open_segment = torch.zeros(B, H, S, D, dtype=dtype, device=device)
        self.rule = get_memory_rule(config.memory_rule)
        empty = self.rule.empty_state(B, H, D, memory_dtype(dtype), device)
        self.layer_caches = [LayerCache(empty, open_segment, open_segment) for _ in range(config.num_layers)]
        self.open_documents = torch.full((B, S), NO_DOCUMENT, device=device)
        self.memory_document = torch.full((B,), NO_DOCUMENT, device=device)
        self.fingerprint = _fingerprint(config, dtype)
        self.columns = 0
        self.packed = False
        self.min_free_slots = S
        self._forget_ids()

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
    def load(cls, path: str | Path, model: PreTrainedModel) -> "InfiniCache":
        """Return the cache in a file, on the model's device.

        Raises:
            ValueError: the file is damaged or not a cache, or the cache of another model or other weights.
        """
        return load_cache(cls, path, model)

    def copy(self) -> "InfiniCache":
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
            layer.k = torch.where(in_range, k[rows, index].to(layer.k.dtype), layer.k)
            layer.v = torch.where(in_range, v[rows, index].to(layer.v.dtype), layer.v)

    def advance(
        self, states: tuple[State, ...], grid: SegmentGrid, open_segment: Tensor, columns: int, ids: Tensor | None
    ) -> None:
        """Move on to the end of `grid`, whose segment `open_segment` (B,) is the one that is not full in each row.

        Args:
            ids: (B, columns) the tokens that were read, None if they were given as embeddings.
        """
        if ids is None or self.ids_hash is None:
            self.ids_hash = None
        else:
            if self.columns < FIRST_IDS:
                self.first_ids = torch.cat([self.first_ids, ids[:, : FIRST_IDS - self.columns]], dim=1)
            self.ids_hash = _hash_after(self.ids_hash, ids)
        for layer, memory in zip(self.layer_caches, states, strict=True):
            layer.memory = memory
        assert grid.documents is not None and grid.memory_document is not None  # a grid after a cache has both
        empty_segment = torch.full_like(grid.documents[:, :1], NO_DOCUMENT)
        rows = torch.arange(len(open_segment), device=open_segment.device)
        self.open_documents = torch.cat([grid.documents, empty_segment], dim=1)[rows, open_segment]
        self.memory_document = grid.memory_document[:, -1]
        self.columns += columns
        self.packed = grid.packed
        self.min_free_slots -= columns
        if self.min_free_slots < 0:
            self.min_free_slots = grid.S - int((self.open_documents != NO_DOCUMENT).sum(1).max())

    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        tensors = [self.open_documents, self.memory_document]
        for layer in self.layer_caches:
            tensors += [*tree_leaves(layer.memory), layer.k, layer.v]
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
        self.open_documents, self.memory_document = self.open_documents[index], self.memory_document[index]
        self.first_ids = self.first_ids[index]
        self.ids_hash, self.offset_hash = (x if x is None else x[index] for x in (self.ids_hash, self.offset_hash))
        for layer in self.layer_caches:
            layer.memory = tree_map(lambda x: x[index], layer.memory)
            layer.k, layer.v = layer.k[index], layer.v[index]

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
        self.open_documents.fill_(NO_DOCUMENT)
        self.memory_document.fill_(NO_DOCUMENT)
        self.columns = 0
        self.packed = False
        self.min_free_slots = self.open_documents.shape[1]
        self._forget_ids()
        for layer in self.layer_caches:
            B, H, _, D = layer.k.shape
            layer.memory = self.rule.empty_state(B, H, D, memory_dtype(layer.k.dtype), layer.k.device)
