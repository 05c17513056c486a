"""Infini-attention: local attention in a segment and the compressive memory of all segments before it.

Shapes: B batch, E width, H heads, N segments, S slots in a segment, T tokens of an incremental call, D head size.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map

from .cache import LayerCache
from .configuration import InfiniGPTNeoConfig
from .decoding import DecodingStep, write_full_segments
from .local_attention import local_attention, rotary_angles, rotate
from .memory import blend, without_autocast
from .memory_rule import State, get_memory_rule, map_state
from .segments import SegmentGrid
from .short_conv import ShortConvolution


class RuleParameters(nn.ParameterDict):
    """A memory rule's own parameters. They are got by a call, so that hooks that load or gather weights run."""

    __call__ = nn.Module.__call__  # ParameterDict's own has an argument

    def forward(self) -> dict[str, Tensor]:
        return dict(self.items())


class InfiniAttention(nn.Module):
    """Local attention and the memory, blended by one gate a head."""

    def __init__(self, config: InfiniGPTNeoConfig, attention_type: str):
        super().__init__()
        self.config = config
        self.window = config.window_size if attention_type == "local" else None
        E = config.hidden_size
        self.k_proj = nn.Linear(E, E, bias=False)
        self.v_proj = nn.Linear(E, E, bias=False)
        self.q_proj = nn.Linear(E, E, bias=False)
        self.out_proj = nn.Linear(E, E, bias=True)
        self.beta = nn.Parameter(torch.full((config.num_heads,), float(config.gate_init)))
        self.rule = get_memory_rule(config.memory_rule)
        self.memory_parameters = RuleParameters(self.rule.parameters(config))
        if config.short_conv:
            self.short_conv = ShortConvolution(config)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(
        self,
        hidden: Tensor,
        grid: SegmentGrid | DecodingStep,
        mask: Tensor | BlockMask | None,
        state: State,
        cached: LayerCache | None,
    ) -> tuple[Tensor, State, tuple[Tensor, Tensor]]:
        """Return the output (B, N * S, E), the memory after the block, and k and v (B, N, H, S, D) as a cache holds
        them, before short convolution and rotary phase.

        Args:
            hidden: (B, N * S, E); grid: of the block; mask: for `local_attention`.
            state: the memory before the block.
            cached: keys and values of the tokens in the first segment that come from a cache.
        """
        B, H, D = hidden.shape[0], self.config.num_heads, self.config.head_dim
        q, k, v = (
            project(hidden).view(B, grid.N, -1, H, D).transpose(2, 3)  # (B, N, H, S, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if isinstance(grid, DecodingStep):
            assert cached is not None and not isinstance(mask, BlockMask)
            out, state = self._decode(q, k, v, grid, mask, state, cached)
            out = self.out_proj(out.transpose(2, 3).reshape(hidden.shape))
            return self.dropout(out), state, (k, v)
        if cached is not None:
            k, v = _insert_cached(k, cached.k, grid), _insert_cached(v, cached.v, grid)
        projected = k, v
        if self.config.short_conv:
            k, v = self.short_conv(k, v, grid.documents if grid.packed else None)

        local_q, local_k = self._with_positions(q, k, grid)
        dropout = self.config.attention_dropout if self.training else 0.0
        local = local_attention(local_q.flatten(0, 1), local_k.flatten(0, 1), v.flatten(0, 1), mask, dropout)
        local = local.unflatten(0, (B, grid.N))

        parameters = self.memory_parameters()
        with without_autocast(hidden.device.type):
            written = (state, k, v, grid.write_mask, grid.memory_document, parameters)
            if grid.group is None:
                before, state = self.rule.write(*written)
            else:
                before, state = self.rule.write_divided(*written, grid.group)
            if grid.memory_of is not None:
                before = tree_map(lambda x: x[grid.memory_of], before)
            out = blend(local, self.rule.read(q, before, parameters), self.beta, grid.read_mask)
        out = self.out_proj(out.transpose(2, 3).reshape(hidden.shape))
        return self.dropout(out), state, projected

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: DecodingStep,
        mask: Tensor | None,
        state: State,
        cached: LayerCache,
    ) -> tuple[Tensor, State]:
        """Put k and v of new tokens (B, 1, H, T, D) into the cache; return the output of each head, and the memory."""
        cached.take_ownership()
        step.put(k[:, 0], cached.k)
        step.put(v[:, 0], cached.v)
        keys, values = self._attended_in_cache(k, v, step, cached)
        local_q = q[:, 0] if step.angles is None else rotate(q[:, 0], *step.angles)
        attended = step.keys(self.window)
        keys, values = (x[:, :, attended].to(q.dtype) for x in (keys, values))
        dropout = self.config.attention_dropout if self.training else 0.0
        out = local_attention(local_q, keys, values, mask, dropout, causal=False)[:, None]
        if step.read_mask is False and step.full is None:
            return out, state
        parameters = self.memory_parameters()
        with without_autocast(q.device.type):
            if step.read_mask is not False:
                read_mask = None if step.read_mask is True else step.read_mask
                before = map_state(lambda x: x[:, None], state)
                out = blend(out, self.rule.read(q, before, parameters), self.beta, read_mask)
            if step.full is not None:
                k, v = self._convolved(cached.k.to(k.dtype), cached.v.to(v.dtype), step.documents)
                state = write_full_segments(self.rule, state, k, v, step.full, parameters)
        return out, state

    def _attended_in_cache(self, k: Tensor, v: Tensor, step: DecodingStep, cached: LayerCache) -> tuple[Tensor, Tensor]:
        """Return k and v of all slots (B, H, S, D) as local attention uses them, those of new tokens included.

        Args:
            k, v: (B, 1, H, T, D) of the new tokens, which the cache has already.
        """
        width = self.config.short_conv
        if step.angles is None and not width:
            return cached.k, cached.v
        if cached.attended_k is None:
            new_k, new_v = self._convolved(cached.k.to(k.dtype), cached.v.to(v.dtype), step.documents)
            if step.angles is not None:
                slots = torch.arange(step.S, device=k.device)
                new_k = rotate(new_k, *rotary_angles(slots, k.shape[-1], self.config.rotary_base))
            cached.attended_k = new_k.to(cached.k.dtype)
            cached.attended_v = new_v.to(cached.v.dtype) if width else None
        else:
            new_k, new_v = k[:, 0], v[:, 0]
            if width:
                last_k, last_v = (step.last_slots(x, width).to(k.dtype) for x in (cached.k, cached.v))
                last_k, last_v = self._convolved(last_k, last_v, step.last_documents(width))
                new_k, new_v = last_k[:, :, -step.T :], last_v[:, :, -step.T :]
            if step.angles is not None:
                new_k = rotate(new_k, *step.angles)
            step.put(new_k, cached.attended_k)
            if cached.attended_v is not None:
                step.put(new_v, cached.attended_v)
        return cached.attended_k, cached.v if cached.attended_v is None else cached.attended_v

    def _convolved(self, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return k and v (B, H, S, D) after short convolution, if there is one; documents: (B, S) or None."""
        if not self.config.short_conv:
            return k, v
        k, v = self.short_conv(k[:, None], v[:, None], None if documents is None else documents[:, None])
        return k[:, 0], v[:, 0]

    def _with_positions(self, q: Tensor, k: Tensor, grid: SegmentGrid) -> tuple[Tensor, Tensor]:
        """Return queries and keys for local attention, rotated if positions are rotary."""
        if self.config.position_embedding != "rotary":
            return q, k
        slots = torch.arange(grid.S, device=q.device)
        positions = grid.positions(q.device)
        if grid.incremental:
            positions = positions[:, None, None]  # (B, N = 1, H = 1, T)
        D, base = self.config.head_dim, self.config.rotary_base
        return rotate(q, *rotary_angles(positions, D, base)), rotate(k, *rotary_angles(slots, D, base))


def _insert_cached(new: Tensor, cached: Tensor, grid: SegmentGrid) -> Tensor:
    """Return keys or values of all slots (B, N, H, S, D): `new`, and those of the open segment from the cache.

    Args:
        new: (B, N, H, S, D), or (B, 1, H, T, D) of the input tokens alone if the grid is incremental.
        cached: (B, H, S, D).
    """
    cached = cached.to(new.dtype)  # under autocast, `new` has a lower precision than the model, as without a cache
    if grid.incremental:
        assert grid.slots is not None
        cached = torch.cat([cached, torch.zeros_like(cached[:, :, :1])], dim=2)  # one more slot, for padding
        index = grid.slots[:, None, :, None].expand(-1, cached.shape[1], -1, cached.shape[3])
        return cached.scatter(2, index, new[:, 0])[:, None, :, :-1]
    assert grid.cached_slots is not None
    first = torch.where(grid.cached_slots[:, None, :, None], cached, new[:, 0])
    return torch.cat([first[:, None], new[:, 1:]], dim=1)
