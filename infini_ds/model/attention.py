"""Infini-attention: local attention in a segment and the compressive memory of all segments before it.

Shapes: B batch, E width, H heads, N segments, S slots in a segment, T tokens of an incremental call, D head size.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map

from .cache import LayerCache
from .configuration import InfiniGPTNeoConfig
from .local_attention import local_attention, rotary_angles, rotate
from .memory import blend
from .memory_rule import State, get_memory_rule
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
        grid: SegmentGrid,
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
        # Without autocast: the memory stays in fp32 whatever the precision of the layer.
        with torch.autocast(hidden.device.type, enabled=False):
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
