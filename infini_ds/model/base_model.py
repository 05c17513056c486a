"""The model without an output layer: all layers over one block of segments after the other.

All segments of a block are computed at once, and only the memory passes from block to block.

Shapes: B batch, T tokens, E width, H heads, N segments, S slots in a segment, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .attention import InfiniAttention
from .block_schedule import BlockSchedule
from .cache import InfiniCache, LayerCache
from .configuration import InfiniGPTNeoConfig
from .layers import InfiniLayer
from .local_attention import document_mask
from .memory import memory_dtype
from .memory_rule import State, get_memory_rule
from .outputs import InfiniModelOutput
from .recompute import checkpoint_blocks
from .segments import SegmentGrid, build_grid, build_grid_after_cache

OutputT = TypeVar("OutputT", bound=tuple[Tensor | None, ...])  # what is computed of a block's hidden states


def reject_unknown_arguments(arguments: dict) -> None:
    """Raise a TypeError for a misspelled argument, or one that requests what this model does not provide."""
    for name, value in arguments.items():
        if name != "cache_position" and not (value is None or value is False or (name == "return_dict" and value)):
            raise TypeError(f"forward() of Infini-GPT-Neo has no argument {name}={value!r:.80}")


class InfiniGPTNeoPreTrainedModel(PreTrainedModel):
    config: InfiniGPTNeoConfig
    config_class = InfiniGPTNeoConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True  # for packed documents; without documents the result is that of "sdpa"
    _no_split_modules = ["InfiniLayer"]
    # Masks in old GPT-Neo files.
    _keys_to_ignore_on_load_unexpected = [r"attn\.attention\.(masked_)?bias$"]  # type: ignore[assignment]

    @property
    def block_schedule(self) -> BlockSchedule:
        """How the model runs over the segments of a row."""
        return cast(BlockSchedule, self.base_model._block_schedule)

    @block_schedule.setter
    def block_schedule(self, schedule: BlockSchedule) -> None:
        self.base_model._block_schedule = schedule  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        # torch.nn.init, not direct writes: while a checkpoint loads, transformers protects loaded weights in it.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, InfiniAttention):
            nn.init.constant_(module.beta, self.config.gate_init)
            for name, initial in module.rule.parameters(self.config).items():
                parameter = module.memory_parameters[name]
                if not getattr(parameter, "_is_hf_initialized", False):  # transformers' flag of loaded weights
                    parameter.data.copy_(initial)


@dataclass(frozen=True)
class ForwardContext:
    """What a forward pass starts from.

    Attributes:
        grid: of the input tokens; states: each layer's memory before the first segment.
        cache: to update, or None.
        open_segment: (B,) the segment of the grid that is not full at the end; None without a cache.
    """

    grid: SegmentGrid
    states: tuple[State, ...]
    cache: InfiniCache | None
    open_segment: Tensor | None


class InfiniGPTNeoModel(InfiniGPTNeoPreTrainedModel):
    """The model without an output layer."""

    def __init__(self, config: InfiniGPTNeoConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "segment":
            self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embed_dropout)
        self.h = nn.ModuleList(InfiniLayer(config, kind) for kind in config.attention_layers)
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.block_schedule = BlockSchedule()
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        use_cache: bool | None = None,
        use_memory: bool = True,
        memory_of: Tensor | None = None,
        **unknown,
    ) -> InfiniModelOutput:
        """Return the hidden states of all tokens; for the arguments see `InfiniGPTNeoForCausalLM.forward`."""
        reject_unknown_arguments(unknown)

        def hidden_alone(hidden: Tensor, slots: slice) -> tuple[Tensor]:
            return (hidden,)

        context = self.prepare(
            input_ids, attention_mask, document_ids, past_key_values, use_cache, use_memory, memory_of
        )
        outputs, memory = self.run_blocks(input_ids, context, hidden_alone, self)
        hidden = context.grid.from_slots(torch.cat([hidden for (hidden,) in outputs], dim=1), input_ids.shape[1])
        return InfiniModelOutput(last_hidden_state=hidden, past_key_values=context.cache, memory=memory)

    def prepare(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: InfiniCache | None = None,
        use_cache: bool | None = None,
        use_memory: bool = True,
        memory_of: Tensor | None = None,
    ) -> ForwardContext:
        """Assign the tokens to segments, and look up the memory that they start from."""
        config, B, device = self.config, input_ids.shape[0], input_ids.device
        open_segment = None
        if cache is None and use_cache:
            cache = InfiniCache(config, B, self.dtype, device)
        if cache is None:
            grid = build_grid(input_ids, config.segment_length, attention_mask, document_ids)
            rule = get_memory_rule(config.memory_rule)
            empty = rule.empty_state(B, config.num_heads, config.head_dim, memory_dtype(self.dtype), device)
            states = (empty,) * len(self.h)
        else:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
            N = 1 if input_ids.shape[1] <= cache.min_free_slots else None
            grid, open_segment = build_grid_after_cache(
                cache.open_documents, cache.memory_document, attention_mask, document_ids, cache.packed, N
            )
            states = tuple(layer.memory for layer in cache.layer_caches)
        if not use_memory:
            grid = replace(grid, read_mask=torch.zeros_like(grid.read_mask))
        if memory_of is not None:
            grid = grid.with_memory_of(memory_of)
        return ForwardContext(grid, states, cache, open_segment)

    def run_blocks(
        self,
        input_ids: Tensor,
        context: ForwardContext,
        output: Callable[[Tensor, slice], OutputT],
        module: nn.Module,
    ) -> tuple[list[OutputT], tuple[State, ...]]:
        """Run all layers and then `output` on each block of segments, one block after the other.

        With gradient checkpointing, nothing of a block, `output` included, is kept for the backward pass but the memory
        before it (on the CPU with `offload_states`). Gradients flow through the memory from block to block, exact
        whatever the block size, unless `truncate_blocks` cuts them.

        Args:
            output: gets hidden (B, slots of the block, E) after the last norm, and their slice of the N * S slots.
            module: the module that holds all parameters in use.
        Returns:
            What `output` returned for each block, and each layer's memory after the last block.
        """
        grid, cache, schedule = context.grid, context.cache, self.block_schedule
        ids = input_ids if grid.incremental else grid.to_slots(input_ids, 0)
        blocks = list(grid.split(schedule.block_segments(self.config.segment_length, self.training)))
        first_leaves, structure = tree_flatten(context.states)
        leaves: tuple[Tensor, ...] = tuple(first_leaves)

        def run_block(index: int, leaves: tuple[Tensor, ...]) -> tuple[OutputT, tuple[Tensor, ...]]:
            first, block = blocks[index]
            if schedule.truncate_blocks and index and index % schedule.truncate_blocks == 0:
                leaves = tuple(x.detach() for x in leaves)
            # An incremental call computes its input tokens, which with padding may be more than a segment.
            slots = slice(first * grid.S, ids.shape[1] if grid.incremental else (first + block.N) * grid.S)
            cached: list[LayerCache | None] = [None] * len(self.h)
            if cache is not None and block.cached_slots is not None:
                cached = list(cache.layer_caches)
            states = tree_unflatten(list(leaves), structure)
            hidden, states, keys_values = self.forward_block(ids[:, slots], states, block, cached)
            if cache is not None:
                assert context.open_segment is not None
                cache.store_open_segments(keys_values, context.open_segment - first)
            return output(hidden, slots), tuple(tree_leaves(states))

        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("use_cache=True is not possible while training with gradient checkpointing")
            uses_rng, offload = self.config.has_dropout, schedule.offload_states
            outputs, leaves = checkpoint_blocks(run_block, len(blocks), leaves, module, uses_rng, offload)
        else:
            outputs = []
            for index in range(len(blocks)):
                block_output, leaves = run_block(index, leaves)
                outputs.append(block_output)
        states = tree_unflatten(list(leaves), structure)
        if cache is not None:
            assert context.open_segment is not None
            cache.advance(states, grid, context.open_segment, columns=input_ids.shape[1])
        return outputs, states

    def forward_block(
        self,
        ids: Tensor,
        states: tuple[State, ...],
        grid: SegmentGrid,
        cached: list[LayerCache | None],
    ) -> tuple[Tensor, tuple[State, ...], list[tuple[Tensor, Tensor]]]:
        """Run all layers over one block of segments, ids (B, N * S).

        Returns:
            hidden (B, N * S, E); each layer's memory after the block; each layer's keys and values (B, N, H, S, D).
        """
        hidden = self.wte(ids)
        if self.config.position_embedding == "segment":
            positions = grid.positions(ids.device)
            hidden = hidden + self.wpe(positions if grid.incremental else positions.repeat(grid.N))
        hidden = self.drop(hidden)
        layers = cast(list[InfiniLayer], list(self.h))
        flex = grid.packed and not grid.incremental and self.config._attn_implementation == "flex_attention"
        masks: dict[int | None, Tensor | BlockMask | None] = {}
        for window in {layer.attention.window for layer in layers}:
            if flex:
                assert grid.documents is not None
                masks[window] = document_mask(grid.documents.flatten(0, 1), window)
            else:
                masks[window] = grid.local_mask(window, ids.device)
        recompute = self.block_schedule.checkpoint_layers and self.training and torch.is_grad_enabled()
        after, keys_values = [], []
        for layer, state, layer_cache in zip(layers, states, cached, strict=True):
            mask = masks[layer.attention.window]
            run_layer: Callable = layer
            if recompute:
                run_layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=self.config.has_dropout)
            hidden, state, layer_keys_values = run_layer(hidden, grid, mask, state, layer_cache)
            after.append(state)
            keys_values.append(layer_keys_values)
        return self.ln_f(hidden), tuple(after), keys_values
