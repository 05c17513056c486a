"""Infini-GPT-Neo: GPT-Neo whose every layer also reads and writes a compressive memory.

Parameter names are GPT-Neo's own, and each layer has one gate `beta` a head. The sequence is computed in blocks of
segments: within a block all segments at once, from block to block only the memory passes on.

Shapes: B batch, T tokens, E width, H heads, D head size, N segments, S slots in a segment, V vocabulary, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ModelOutput

from .block_schedule import BlockSchedule
from .cache import InfiniCache, LayerState
from .configuration import InfiniGPTNeoConfig
from .local_attention import document_mask, local_attention, rotary_angles, rotate
from .loss import IGNORE_INDEX, summed_loss, token_losses
from .memory import blend, memory_dtype
from .memory_rule import State, get_memory_rule
from .recompute import recomputed
from .segments import SegmentGrid, lay_out, lay_out_after


@dataclass
class InfiniModelOutput(ModelOutput):
    """`memory`: each layer's state after the last segment, as its memory rule keeps it."""

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: InfiniCache | None = None
    memory: tuple[State, ...] | None = None


@dataclass
class InfiniCausalLMOutput(ModelOutput):
    """`loss` as asked for by `loss_reduction`; `logits` None where they were not asked for."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: InfiniCache | None = None
    memory: tuple[State, ...] | None = None


@dataclass
class InfiniSequenceClassifierOutput(ModelOutput):
    """`memory`: each layer's state after the last segment, as its memory rule keeps it."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    memory: tuple[State, ...] | None = None


class InfiniAttention(nn.Module):
    """Local attention and the memory, blended by a gate for each head."""

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
        self.memory_parameters = nn.ParameterDict(self.rule.parameters(config))
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(
        self, hidden: Tensor, grid: SegmentGrid, mask: Tensor | None, state: State, cached: LayerState | None
    ) -> tuple[Tensor, State, tuple[Tensor, Tensor]]:
        """hidden (B, N * S, E) -> the same, the memory after the block, and k and v (B, N, H, S, D).

        `mask`: for `local_attention`; `cached`: fills the slots of tokens that came before.
        """
        B, H, D = hidden.shape[0], self.config.num_heads, self.config.head_dim
        q, k, v = (
            project(hidden).view(B, grid.N, -1, H, D).transpose(2, 3)  # (B, N, H, S, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cached is not None:
            k, v = _after_cached(k, cached.k, grid), _after_cached(v, cached.v, grid)

        local_q, local_k = self._with_positions(q, k, grid)
        local = local_attention(
            *(x.flatten(0, 1) for x in (local_q, local_k, v)),
            mask,
            self.config.attention_dropout if self.training else 0.0,
        ).unflatten(0, (B, grid.N))

        # Outside of autocast: the memory keeps fp32 whatever the precision of the layer.
        with torch.autocast(hidden.device.type, enabled=False):
            before, state = self.rule.write(state, k, v, grid.write, grid.held, self.memory_parameters)
            if grid.memory_of is not None:
                before = tree_map(lambda x: x[grid.memory_of], before)
            retrieved = self.rule.read(q, before, self.memory_parameters)
            out = blend(local, retrieved, self.beta, grid.read)
        out = self.out_proj(out.transpose(2, 3).reshape(hidden.shape))
        return self.dropout(out), state, (k, v)

    def _with_positions(self, q: Tensor, k: Tensor, grid: SegmentGrid) -> tuple[Tensor, Tensor]:
        if self.config.position_embedding != "rotary":
            return q, k
        slots = torch.arange(grid.S, device=q.device)
        positions = grid.positions(q.device)
        if grid.step:
            positions = positions[:, None, None]  # (B, N = 1, H = 1, T)
        D, base = self.config.head_dim, self.config.rotary_base
        return rotate(q, *rotary_angles(positions, D, base)), rotate(k, *rotary_angles(slots, D, base))


def _after_cached(new: Tensor, cached: Tensor, grid: SegmentGrid) -> Tensor:
    """Keys or values of all slots: `new` (B, N, H, S, D), or of the tokens of a step, behind `cached` (B, H, S, D)."""
    cached = cached.to(new.dtype)  # under autocast `new` is in less than the model's precision, as without a cache
    if grid.step:
        cached = torch.cat([cached, torch.zeros_like(cached[:, :, :1])], dim=2)  # a place for padding
        index = grid.slots[:, None, :, None].expand(-1, cached.shape[1], -1, cached.shape[3])
        return cached.scatter(2, index, new[:, 0])[:, None, :, :-1]
    first = torch.where(grid.from_cache[:, None, :, None], cached, new[:, 0])
    return torch.cat([first[:, None], new[:, 1:]], dim=1)


class InfiniMLP(nn.Module):
    def __init__(self, config: InfiniGPTNeoConfig):
        super().__init__()
        inner = config.intermediate_size or 4 * config.hidden_size
        self.c_fc = nn.Linear(config.hidden_size, inner)
        self.c_proj = nn.Linear(inner, config.hidden_size)
        name = config.activation_function
        # torch's own tanh form of GELU is the same function as "gelu_new", in one kernel in place of eight.
        self.act = nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden))))


class InfiniLayer(nn.Module):
    def __init__(self, config: InfiniGPTNeoConfig, attention_type: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = nn.ModuleDict({"attention": InfiniAttention(config, attention_type)})  # GPT-Neo's two levels
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = InfiniMLP(config)

    @property
    def attention(self) -> InfiniAttention:
        return self.attn["attention"]

    def forward(self, hidden: Tensor, *args) -> tuple[Tensor, State, tuple[Tensor, Tensor]]:
        attended, state, kv = self.attention(self.ln_1(hidden), *args)
        hidden = hidden + attended
        return hidden + self.mlp(self.ln_2(hidden)), state, kv


def refuse_unknown(arguments: dict) -> None:
    """Raise a TypeError for a misspelt argument, or one that asks for what this model does not give."""
    for name, value in arguments.items():
        if name != "cache_position" and not (value is None or value is False or (name == "return_dict" and value)):
            raise TypeError(f"forward() of Infini-GPT-Neo has no argument {name}={value!r:.80}")


class InfiniGPTNeoPreTrainedModel(PreTrainedModel):
    config_class = InfiniGPTNeoConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True  # for packed documents; without documents it gives what "sdpa" gives
    _no_split_modules = ["InfiniLayer"]
    _keys_to_ignore_on_load_unexpected = [r"attn\.attention\.(masked_)?bias$"]  # masks that old GPT-Neo files hold

    def _init_weights(self, module: nn.Module):
        # torch.nn.init and no direct writes: while a checkpoint loads, transformers guards loaded weights through it.
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
class Run:
    """What a forward pass starts from: the grid of its tokens, each layer's memory, and the cache to go on with.

    `still_open`: with a cache, (B,) the segment of the grid that is not full afterwards.
    """

    grid: SegmentGrid
    states: tuple[State, ...]
    cache: InfiniCache | None
    still_open: Tensor | None


class InfiniGPTNeoModel(InfiniGPTNeoPreTrainedModel):
    """The model without its output layer."""

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

    def set_input_embeddings(self, embeddings: nn.Embedding):
        self.wte = embeddings

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
        """Hidden states of all tokens; arguments as in `InfiniGPTNeoForCausalLM.forward`."""
        refuse_unknown(unknown)
        run = self.start(input_ids, attention_mask, document_ids, past_key_values, use_cache, use_memory, memory_of)
        outputs, memory = self.run(input_ids, run, head=lambda hidden, slots: (hidden,), owner=self)
        hidden = run.grid.collect(torch.cat([hidden for (hidden,) in outputs], dim=1), input_ids.shape[1])
        return InfiniModelOutput(last_hidden_state=hidden, past_key_values=run.cache, memory=memory)

    def start(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: InfiniCache | None = None,
        use_cache: bool | None = None,
        use_memory: bool = True,
        memory_of: Tensor | None = None,
    ) -> Run:
        """Lay the tokens out and find the memory that they start from."""
        B, device = input_ids.shape[0], input_ids.device
        if cache is None and use_cache:
            cache = InfiniCache(self.config, B, self.dtype, device)
        if cache is None:
            grid, still_open = lay_out(input_ids, self.config.segment_length, attention_mask, document_ids), None
            rule, H, D = get_memory_rule(self.config.memory_rule), self.config.num_heads, self.config.head_dim
            states = (rule.empty_state(B, H, D, memory_dtype(self.dtype), device),) * len(self.h)
        else:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
            N = 1 if input_ids.shape[1] <= cache.room else None
            grid, still_open = lay_out_after(cache.documents, cache.held, attention_mask, document_ids, cache.packed, N)
            states = tuple(layer.memory for layer in cache.layer_states)
        if not use_memory:
            grid = replace(grid, read=torch.zeros_like(grid.read))
        if memory_of is not None:
            grid = grid.reading_from(memory_of)
        return Run(grid, states, cache, still_open)

    def run(
        self, input_ids: Tensor, run: Run, head: Callable[[Tensor, slice], tuple[Tensor | None, ...]], owner: nn.Module
    ) -> tuple[list[tuple[Tensor | None, ...]], tuple[State, ...]]:
        """The block schedule: `head(hidden, slots)` of each block of segments, one block after the other.

        `hidden` is (B, slots of the block, E) after the last norm, `slots` their place in the row's N * S slots, and
        `owner` the module that holds all parameters in use. With gradient checkpointing a block, head included, keeps
        nothing for the backward pass but the memory before it (on the CPU with `offload_states`). Gradients flow
        through the memory from block to block, exact whatever the block size, unless `truncate_blocks` cuts them.

        Returns:
            What the head returned for each block, and each layer's memory after the last block.
        """
        grid, cache, schedule = run.grid, run.cache, self.block_schedule
        ids = input_ids if grid.step else grid.place(input_ids, 0)
        blocks = list(grid.blocks(schedule.block_segments(self.config.segment_length, self.training)))

        def compute(index: int, flat: tuple[Tensor, ...]):
            first, block = blocks[index]
            if schedule.truncate_blocks and index and index % schedule.truncate_blocks == 0:
                flat = [x.detach() for x in flat]
            # In a step `ids` are the tokens given, which with their padding may be more than a segment.
            slots = slice(first * grid.S, ids.shape[1] if grid.step else (first + block.N) * grid.S)
            cached = [None] * len(self.h) if block.from_cache is None else cache.layer_states
            states = tree_unflatten(list(flat), structure)
            hidden, states, keys_values = self.block(ids[:, slots], states, block, cached)
            if cache is not None:
                cache.keep_open(keys_values, run.still_open - first)
            return head(hidden, slots), tuple(tree_leaves(states))

        leaves, structure = tree_flatten(run.states)
        flat = tuple(leaves)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("use_cache=True is not possible while training with gradient checkpointing")
            draws, offload = self.config.has_dropout, schedule.offload_states
            outputs, flat = recomputed(compute, len(blocks), flat, owner, draws, offload)
        else:
            outputs = []
            for index in range(len(blocks)):
                output, flat = compute(index, flat)
                outputs.append(output)
        states = tree_unflatten(list(flat), structure)
        if cache is not None:
            cache.advance(states, grid, run.still_open, columns=input_ids.shape[1])
        return outputs, states

    def block(
        self,
        ids: Tensor,
        states: tuple[State, ...],
        grid: SegmentGrid,
        cached: list[LayerState | None],
    ) -> tuple[Tensor, tuple[State, ...], list[tuple[Tensor, Tensor]]]:
        """All layers over one block of segments: ids (B, N * S) -> hidden (B, N * S, E), memory, keys and values."""
        hidden = self.wte(ids)
        if self.config.position_embedding == "segment":
            positions = grid.positions(ids.device)
            hidden = hidden + self.wpe(positions if grid.step else positions.repeat(grid.N))
        hidden = self.drop(hidden)
        by_rule = grid.packed and not grid.step and self.config._attn_implementation == "flex_attention"
        masks = {
            window: document_mask(grid.documents.flatten(0, 1), window)
            if by_rule
            else grid.local_mask(window, ids.device)
            for window in {layer.attention.window for layer in self.h}
        }
        after, keys_values = [], []
        for layer, state, layer_cached in zip(self.h, states, cached, strict=True):
            mask = masks[layer.attention.window]
            if self.block_schedule.checkpoint_layers and self.training and torch.is_grad_enabled():
                draws = self.config.has_dropout
                layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=draws)
            hidden, state, kv = layer(hidden, grid, mask, state, layer_cached)
            after.append(state)
            keys_values.append(kv)
        return self.ln_f(hidden), tuple(after), keys_values


class InfiniGPTNeoForCausalLM(InfiniGPTNeoPreTrainedModel, GenerationMixin):
    """Infini-GPT-Neo with its output layer, tied to the input embedding as in GPT-Neo."""

    _is_stateful = True  # transformers then refuses assisted generation and prompt lookup, which take tokens back
    # transformers 4 takes a list here and transformers 5 a dict.
    _tied_weights_keys = (
        {"lm_head.weight": "transformer.wte.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: InfiniGPTNeoConfig):
        super().__init__(config)
        self.transformer = InfiniGPTNeoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def block_schedule(self) -> BlockSchedule:
        return self.transformer.block_schedule

    @block_schedule.setter
    def block_schedule(self, schedule: BlockSchedule) -> None:
        self.transformer.block_schedule = schedule

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, embeddings: nn.Linear):
        self.lm_head = embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        use_cache: bool | None = None,
        use_memory: bool = True,
        memory_of: Tensor | None = None,
        loss_reduction: str = "mean",
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        **unknown,
    ) -> InfiniCausalLMOutput:
        """
        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding, wherever it stands: neither read nor written, and without a place.
            document_ids: (B, T) integers from 0 that never decrease in a row: local attention and memory keep the
                documents of a packed row apart. None: each row is one document, which goes on where the cache ended.
            labels: (B, T), usually `input_ids`; shifted here. -100 counts for nothing.
            past_key_values: the cache of an earlier call. `input_ids` are then what follows; `attention_mask` may be of
                these alone, or of all since the start.
            use_cache: return a cache. None: only if one is given.
            use_memory: False switches the memory off: local attention alone, whatever the gates.
            memory_of: (B,) the row whose memory each row reads, as it is before the same segment; None: its own. All
                else stays with the row: its local attention, and what it writes to its own memory.
            loss_reduction: "mean" over the labels that count, "sum", or "none": (B, T - 1) losses of the next token.
            num_items_in_batch: the mean's denominator, where these rows are only a part of a batch.
            logits_to_keep: logits of the last so many positions only; 0 for all.
            return_logits: None: yes, unless training with labels, where logits of a whole sequence never exist.

        Raises:
            ValueError: an unknown loss_reduction, or a cache under gradient checkpointing.
            TypeError: an argument that there is not; what transformers passes to all models is let through.
        """
        refuse_unknown(unknown)
        if loss_reduction not in ("mean", "sum", "none"):
            raise ValueError(f"loss_reduction={loss_reduction!r} is not one of mean, sum, none")
        if return_logits is None:
            return_logits = labels is None or not self.training
        run = self.transformer.start(
            input_ids, attention_mask, document_ids, past_key_values, use_cache, use_memory, memory_of
        )
        grid, T = run.grid, input_ids.shape[1]
        if labels is not None:
            targets = grid.next_tokens(labels, IGNORE_INDEX)

        def head(hidden: Tensor, slots: slice) -> tuple[Tensor | None, Tensor | None]:
            loss = None
            if labels is not None:
                losses = token_losses if loss_reduction == "none" else summed_loss
                goal = targets[:, slots]
                loss = losses(hidden.flatten(0, 1), self.lm_head.weight, goal.flatten())
                loss = loss.view(goal.shape) if loss_reduction == "none" else loss
            return loss, hidden if return_logits else None

        outputs, memory = self.transformer.run(input_ids, run, head, owner=self)
        losses, hidden = zip(*outputs, strict=True)
        loss = logits = None
        if labels is not None and loss_reduction == "none":
            loss = grid.collect(torch.cat(losses, dim=1), T)[:, :-1]
        elif labels is not None:
            loss = torch.stack(losses).sum()
            if loss_reduction == "mean":
                loss = loss / ((targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)
        if return_logits:
            logits = self.lm_head(grid.collect(torch.cat(hidden, dim=1), T)[:, -logits_to_keep:])
        return InfiniCausalLMOutput(loss=loss, logits=logits, past_key_values=run.cache, memory=memory)

    def compile_layers(self) -> None:
        """Compile each layer in place. All layers share one compilation, and a new shape of a block costs another."""
        for layer in self.transformer.h:
            layer.compile()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if hasattr(criterion, "max_position_embeddings"):
                criterion.max_position_embeddings = None  # only there for a warning; it is no limit of this model
        return criteria

    def _prepare_generated_length(self, generation_config, has_default_max_length: bool, **kwargs):
        # transformers' default of 20 new tokens, which it would cut off at max_position_embeddings.
        if has_default_max_length and generation_config.max_new_tokens is None and generation_config.max_length == 20:
            generation_config.max_new_tokens = 20
        return super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length, **kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: InfiniCache | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        **kwargs,
    ) -> dict:
        done = 0 if past_key_values is None else past_key_values.columns
        if document_ids is not None:  # new tokens belong to the last document of the prompt
            added = input_ids.shape[1] - document_ids.shape[1]
            document_ids = torch.cat([document_ids, document_ids[:, -1:].expand(-1, added)], dim=1)[:, done:]
        return {
            "input_ids": input_ids[:, done:],
            "attention_mask": None if attention_mask is None else attention_mask[:, done:],
            "document_ids": document_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "use_memory": kwargs.get("use_memory", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }


class InfiniGPTNeoForSequenceClassification(InfiniGPTNeoPreTrainedModel):
    """The last token's hidden state times `score`, as in GPT-Neo. It has read all earlier segments in the memory."""

    _keys_to_ignore_on_load_unexpected = [
        *InfiniGPTNeoPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"lm_head\.weight$",  # of the language model that this one starts from
    ]

    def __init__(self, config: InfiniGPTNeoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = InfiniGPTNeoModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @property
    def block_schedule(self) -> BlockSchedule:
        return self.transformer.block_schedule

    @block_schedule.setter
    def block_schedule(self, schedule: BlockSchedule) -> None:
        self.transformer.block_schedule = schedule

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_memory: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        **unknown,
    ) -> InfiniSequenceClassifierOutput:
        """
        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding, wherever it stands. It alone says what is padding: without it all
                tokens count, whatever their id. A row of padding alone gets logits of 0.
            labels: what `config.problem_type` says, and if that is None, their number and type do: (B,) numbers
                ("regression", C = 1), (B,) integers ("single_label_classification", -100 counts for nothing), or
                (B, C) numbers from 0 to 1 ("multi_label_classification").
            use_memory: False switches the memory off: local attention alone, whatever the gates.
            num_items_in_batch: the mean's denominator of single labels, where these rows are only a part of a batch.

        Returns:
            `logits` (B, C), and the mean `loss` if there are labels.

        Raises:
            TypeError: an argument that there is not; what transformers passes to all models is let through.
        """
        refuse_unknown(unknown)
        run = self.transformer.start(input_ids, attention_mask, use_memory=use_memory)
        B, T = input_ids.shape
        # Padding has no slot, so a row's tokens fill its slots from the first one on.
        last = input_ids.new_full((B,), T - 1) if attention_mask is None else attention_mask.bool().sum(1) - 1

        def head(hidden: Tensor, slots: slice) -> tuple[Tensor]:
            """(B, slots of the block, E) -> (B, E): the last token's state, 0 where it is in another block."""
            places = torch.arange(slots.start, slots.stop, device=hidden.device)
            return ((hidden * (places == last[:, None])[..., None]).sum(1),)

        outputs, memory = self.transformer.run(input_ids, run, head, owner=self.transformer)
        logits = self.score(torch.stack([state for (state,) in outputs]).sum(0))
        loss = None
        if labels is not None:
            of_parts = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **of_parts)
        return InfiniSequenceClassifierOutput(loss=loss, logits=logits, memory=memory)
