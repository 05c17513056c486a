"""The model without an output layer: all layers over one block of segments after the other.

All segments of a block are computed at once, and only the memory passes from block to block.

Shapes: B batch, T tokens, E width, H heads, N segments, S slots in a segment, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from .arguments import (
    check_token_types,
    checked_mask,
    documents_of_positions,
    one_cache,
    one_of_ids_and_embeds,
    reject_attentions,
    reject_unknown_arguments,
)
from .attention import InfiniAttention
from .block_schedule import BlockSchedule
from .cache import InfiniCache, LayerCache, check_cache
from .configuration import InfiniGPTNeoConfig
from .decoding import DecodingStep, fits, plan_step, run_step
from .embedding_conv import EmbeddedRows, EmbeddingConvolution
from .layers import InfiniLayer
from .local_attention import document_mask
from .memory import memory_dtype
from .memory_rule import State, get_memory_rule
from .outputs import InfiniModelOutput, as_requested, wants_dict
from .recompute import checkpoint_blocks
from .segments import SegmentGrid, build_grid, build_grid_after_cache
from .sequence_parallel import SequenceGroup
from .short_conv import ShortConvolution

logger = logging.get_logger(__name__)
OutputT = TypeVar("OutputT", bound=tuple[Tensor | None, ...])  # what is computed of a block's hidden states


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

    @property
    def sequence_group(self) -> SequenceGroup | None:
        """The ranks over which the segments of a row are divided; None: this process computes complete rows.

        With a group, all of its ranks call the model with the same rows, and get the outputs of the complete rows.
        """
        return cast(SequenceGroup | None, self.base_model._sequence_group)

    @sequence_group.setter
    def sequence_group(self, group: SequenceGroup | None) -> None:
        rule = get_memory_rule(self.config.memory_rule)
        if group is not None and not rule.can_be_divided:
            raise ValueError(
                f"memory_rule={rule.name!r} has no write_divided, so rows cannot be divided over ranks: set "
                "sequence_group to None, or take a rule that has it"
            )
        self.base_model._sequence_group = group  # type: ignore[assignment]

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
        if isinstance(module, ShortConvolution | EmbeddingConvolution):
            embedding = cast(InfiniGPTNeoModel, self.base_model).wte
            if getattr(embedding.weight, "_is_hf_initialized", False):  # the other weights come from a file
                module.start_as_identity()
            else:
                module.start()
        # Of an InfiniAttention, which transformers 5 skips if `beta` is loaded.
        if isinstance(module, nn.ParameterDict):
            for name, initial in get_memory_rule(self.config.memory_rule).parameters(self.config).items():
                parameter = module[name]
                if not getattr(parameter, "_is_hf_initialized", False):  # transformers' flag of loaded weights
                    parameter.data.copy_(initial)


@dataclass(frozen=True)
class ForwardContext:
    """What a forward pass starts from.

    Attributes:
        input_ids: (B, T), 0 where embeddings are given; inputs_embeds: (B, T, E) or None.
        grid: of the input tokens, or where they lie in a cache; states: each layer's memory before the first segment.
        cache: to update, or None.
        open_segment: (B,) the segment of the grid that is not full at the end; None without a cache.
    """

    input_ids: Tensor
    inputs_embeds: Tensor | None
    grid: SegmentGrid | DecodingStep
    states: tuple[State, ...]
    cache: InfiniCache | None
    open_segment: Tensor | None

    def in_order(self, of_blocks: Sequence[Tensor]) -> Tensor:
        """Return the blocks' hidden states in the order of the input tokens, (B, T, E), and 0 at padding."""
        grid, T = self.grid, self.input_ids.shape[1]
        hidden = grid.from_slots(grid.join(of_blocks), T)
        if isinstance(grid, SegmentGrid) and grid.incremental:
            assert grid.slots is not None
            hidden = hidden.masked_fill((grid.slots == grid.S)[..., None], 0)
        return hidden


class InfiniGPTNeoModel(InfiniGPTNeoPreTrainedModel):
    """The model without an output layer."""

    _keys_to_ignore_on_load_unexpected = [
        *InfiniGPTNeoPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^(lm_head|score)\.weight$",  # of the models with a head
    ]

    def __init__(self, config: InfiniGPTNeoConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "segment":
            self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_conv = EmbeddingConvolution(config) if config.embed_conv else None
        self.drop = nn.Dropout(config.embed_dropout)
        self.h = nn.ModuleList(InfiniLayer(config, kind) for kind in config.attention_layers)
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.block_schedule = BlockSchedule()
        self.sequence_group = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        use_cache: bool | None = None,
        use_memory: bool = True,
        memory_of: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: InfiniCache | None = None,
        **unknown,
    ) -> InfiniModelOutput | tuple:
        """Return the hidden states of all tokens; for the arguments see `InfiniGPTNeoForCausalLM.forward`."""
        reject_unknown_arguments(unknown, position_ids, document_ids)
        reject_attentions(output_attentions, self.config)

        def hidden_alone(hidden: Tensor, slots: slice) -> tuple[Tensor]:
            return (hidden,)

        context = self.prepare(
            input_ids,
            attention_mask,
            document_ids,
            one_cache(past_key_values, cache),
            use_cache,
            use_memory,
            memory_of,
            inputs_embeds,
            position_ids,
            token_type_ids,
        )
        outputs, memory, hidden_states = self.run_blocks(context, hidden_alone, self, output_hidden_states)
        output = InfiniModelOutput(
            context.in_order([hidden for (hidden,) in outputs]),  # type: ignore[arg-type]
            context.cache,
            hidden_states=hidden_states,  # type: ignore[arg-type]
            memory=memory,
        )
        return as_requested(output, wants_dict(return_dict, self.config))

    def prepare(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: InfiniCache | None = None,
        use_cache: bool | None = None,
        use_memory: bool = True,
        memory_of: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ForwardContext:
        """Check the arguments, assign the tokens to segments, and look up the memory that they start from."""
        tokens = one_of_ids_and_embeds(input_ids, inputs_embeds)
        check_token_types(token_type_ids)
        config, B, device = self.config, tokens.shape[0], tokens.device
        if cache is not None:
            check_cache(cache, config, B, self.dtype)
        if self.sequence_group is not None and (cache is not None or use_cache):
            raise ValueError(
                "a cache is not possible where rows are divided over ranks: leave it away with use_cache=False, or set "
                "the model's sequence_group to None"
            )
        past = None if cache is None else cache.columns
        attention_mask = checked_mask(attention_mask, tokens, past)
        if position_ids is not None:
            document_ids = documents_of_positions(position_ids, tokens, attention_mask, document_ids, past)
        if cache is None and self._wants_cache(use_cache):
            cache = InfiniCache(config, B, self.dtype, device)
        if cache is not None and fits(self, cache, tokens, attention_mask, document_ids, memory_of):
            step = plan_step(config, cache, tokens.shape[1], use_memory)
            return ForwardContext(tokens, inputs_embeds, step, cache.memories(), cache, None)
        open_segment = None
        if cache is None:
            grid = build_grid(tokens, config.segment_length, attention_mask, document_ids, self.sequence_group)
            rule = get_memory_rule(config.memory_rule)
            empty = rule.empty_state(B, config.num_heads, config.head_dim, memory_dtype(self.dtype), device)
            states = (empty,) * len(self.h)
        else:
            attention_mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
            N = 1 if tokens.shape[1] <= cache.free_slots() else None
            grid, open_segment = build_grid_after_cache(
                cache.open_documents, cache.memory_document, attention_mask, document_ids, cache.packed, N
            )
            states = cache.memories()
        if not use_memory:
            grid = replace(grid, read_mask=torch.zeros_like(grid.read_mask))
        if memory_of is not None:
            grid = grid.with_memory_of(memory_of)
        return ForwardContext(tokens, inputs_embeds, grid, states, cache, open_segment)

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and self.sequence_group is None
        if use_cache and self.training and self.gradient_checkpointing:
            logger.warning_once(  # type: ignore[attr-defined]
                "use_cache=True is not possible with gradient checkpointing: use_cache is set to False"
            )
            return False
        return bool(use_cache)

    def run_blocks(
        self,
        context: ForwardContext,
        output: Callable[[Tensor, slice], OutputT],
        module: nn.Module,
        output_hidden_states: bool | None = False,
    ) -> tuple[list[OutputT], tuple[State, ...], tuple[Tensor, ...] | None]:
        """Run all layers and then `output` on each block of segments, one block after the other.

        With gradient checkpointing, nothing of a block, `output` included, is kept for the backward pass but the memory
        before it (on the CPU with `offload_states`). Gradients flow through the memory from block to block, exact
        whatever the block size, unless `truncate_blocks` cuts them.

        Args:
            output: gets hidden (B, slots of the block, E) after the last norm, and their slice of the N * S slots.
            module: the module that holds all parameters in use.
            output_hidden_states: return them; None: if the configuration asks for them.
        Returns:
            What `output` returned for each block, each layer's memory after the last block, and the hidden states
            (B, T, E) of the embeddings and after each layer, or None.
        """
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        grid, cache, schedule = context.grid, context.cache, self.block_schedule
        if isinstance(grid, DecodingStep):
            return run_step(self, context, output, output_hidden_states)

        earlier = None if cache is None else cache.earlier_tokens()
        rows = EmbeddedRows(self.wte, self.embed_conv, context.input_ids, context.inputs_embeds, grid, earlier)
        blocks = list(grid.split(schedule.block_segments(self.config.segment_length, self.training)))
        # An incremental call computes its input tokens, which with padding may be more than a segment.
        T = context.input_ids.shape[1]
        ends = [T if grid.incremental else (first + block.N) * grid.S for first, block in blocks]
        all_slots = [slice(first * grid.S, end) for (first, _), end in zip(blocks, ends, strict=True)]
        embeds = [given for slots in all_slots if (given := rows.given(slots)) is not None]
        first_leaves, structure = tree_flatten(context.states)
        leaves: tuple[Tensor, ...] = tuple(first_leaves)

        def run_block(
            index: int, leaves: tuple[Tensor, ...], block_embeds: Tensor | None
        ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
            (first, block), slots = blocks[index], all_slots[index]
            if schedule.truncate_blocks and index and index % schedule.truncate_blocks == 0:
                leaves = tuple(x.detach() for x in leaves)
            cached: list[LayerCache | None] = [None] * len(self.h)
            if cache is not None and block.cached_slots is not None:
                cached = list(cache.layer_caches)
            states = tree_unflatten(list(leaves), structure)
            hidden_states, states, keys_values = self.forward_block(
                rows.of_block(slots, block_embeds), states, block, cached, output_hidden_states
            )
            if cache is not None:
                assert context.open_segment is not None
                cache.store_open_segments(keys_values, context.open_segment - first)
            kept = hidden_states if output_hidden_states else []
            return (*output(hidden_states[-1], slots), *kept), tuple(tree_leaves(states))

        outputs: list[tuple[Tensor | None, ...]] = []
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("past_key_values are not possible while training with gradient checkpointing")
            outputs, leaves = checkpoint_blocks(
                run_block, len(blocks), leaves, module, schedule.offload_states, tuple(embeds)
            )
        else:
            for index in range(len(blocks)):
                block_output, leaves = run_block(index, leaves, embeds[index] if embeds else None)
                outputs.append(block_output)
        states = tree_unflatten(list(leaves), structure)
        if cache is not None:
            assert context.open_segment is not None
            read = context.input_ids if context.inputs_embeds is None else None
            if earlier is not None:
                cache.last_embeds = rows.last().to(cache.last_embeds.dtype)
            cache.advance(states, grid, context.open_segment, T, read)
        hidden_states = None
        if output_hidden_states:
            count = len(self.h) + 1
            of_layers = zip(*(block_output[-count:] for block_output in outputs), strict=True)
            hidden_states = tuple(context.in_order(cast(tuple[Tensor, ...], of_blocks)) for of_blocks in of_layers)
            outputs = [block_output[:-count] for block_output in outputs]
        return cast(list[OutputT], outputs), states, hidden_states

    def forward_block(
        self,
        embeds: Tensor,
        states: tuple[State, ...],
        grid: SegmentGrid | DecodingStep,
        cached: list[LayerCache | None],
        keep_hidden: bool = False,
    ) -> tuple[list[Tensor], tuple[State, ...], list[tuple[Tensor, Tensor]]]:
        """Run all layers over one block of segments, whose embeddings are (B, N * S, E).

        Returns:
            hidden (B, N * S, E) after the last norm, and with `keep_hidden` before it those before each layer;
            each layer's memory after the block; each layer's keys and values (B, N, H, S, D).
        """
        hidden = embeds
        if self.config.position_embedding == "segment":
            positions = grid.positions(embeds.device)
            hidden = hidden + self.wpe(positions if grid.incremental else positions.repeat(grid.N))
        hidden = self.drop(hidden)
        layers = cast(list[InfiniLayer], list(self.h))
        flex = grid.packed and not grid.incremental and self.config._attn_implementation == "flex_attention"
        masks: dict[int | None, Tensor | BlockMask | None] = {}
        for window in {layer.attention.window for layer in layers}:
            if flex:
                assert isinstance(grid, SegmentGrid) and grid.documents is not None
                masks[window] = document_mask(grid.documents.flatten(0, 1), window)
            else:
                masks[window] = grid.local_mask(window, embeds.device)
        recompute = self.block_schedule.checkpoint_layers and self.training and torch.is_grad_enabled()
        all_hidden, after, keys_values = [], [], []
        for layer, state, layer_cache in zip(layers, states, cached, strict=True):
            mask = masks[layer.attention.window]
            run_layer: Callable = layer
            if recompute:
                run_layer = partial(checkpoint, layer, use_reentrant=False)
            if keep_hidden:
                all_hidden.append(hidden)
            hidden, state, layer_keys_values = run_layer(hidden, grid, mask, state, layer_cache)
            after.append(state)
            keys_values.append(layer_keys_values)
        return [*all_hidden, self.ln_f(hidden)], tuple(after), keys_values
