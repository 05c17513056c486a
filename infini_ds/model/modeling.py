"""Infini-GPT-Neo: GPT-Neo whose every layer also reads and writes a compressive memory, as Hugging Face models.

Parameter names are GPT-Neo's own; each layer adds one gate `beta` a head, the parameters of its memory rule,
and those of its short convolution if it has one. A convolution of the embeddings has parameters of its own.

Shapes: B batch, T tokens, E width, V vocabulary, C labels.
"""

import torch
import transformers
from torch import Tensor, nn

from .arguments import one_cache, reject_attentions, reject_unknown_arguments
from .base_model import InfiniGPTNeoModel, InfiniGPTNeoPreTrainedModel
from .cache import InfiniCache
from .configuration import InfiniGPTNeoConfig
from .generation import InfiniGenerationMixin
from .loss import IGNORE_INDEX, layer_losses, plain_weight, summed_loss, token_losses
from .outputs import InfiniCausalLMOutput, InfiniSequenceClassifierOutput, as_requested, wants_dict

# isort: split
# An export's code is copied by transformers 4, which follows the direct imports of this file and of configuration.py
# alone: what other files import is repeated.
from .attention import InfiniAttention  # noqa: F401
from .cache_file import save_cache  # noqa: F401
from .decoding import DecodingStep  # noqa: F401
from .embedding_conv import EmbeddingConvolution  # noqa: F401
from .layers import InfiniLayer  # noqa: F401
from .local_attention import local_attention  # noqa: F401
from .recompute import checkpoint_blocks  # noqa: F401
from .segments import SegmentGrid  # noqa: F401
from .short_conv import ShortConvolution  # noqa: F401

TRANSFORMERS = int(transformers.__version__.split(".")[0])


class InfiniGPTNeoForCausalLM(InfiniGPTNeoPreTrainedModel, InfiniGenerationMixin):  # type: ignore[misc]
    """Infini-GPT-Neo with its output layer, tied to the input embedding as in GPT-Neo."""

    _is_stateful = True  # transformers then rejects assisted generation and prompt lookup, which take tokens back
    # transformers 4 takes a list, transformers 5 a dict.
    _tied_weights_keys = (
        {"lm_head.weight": "transformer.wte.weight"} if TRANSFORMERS >= 5 else ["lm_head.weight"]  # type: ignore[assignment]
    )

    def __init__(self, config: InfiniGPTNeoConfig):
        super().__init__(config)
        self.transformer = InfiniGPTNeoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, embeddings: nn.Linear) -> None:
        self.lm_head = embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        use_cache: bool | None = None,
        use_memory: bool = True,
        memory_of: Tensor | None = None,
        loss_reduction: str = "mean",
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: InfiniCache | None = None,
        **unknown,
    ) -> InfiniCausalLMOutput | tuple:
        """Return the loss if there are labels, logits, the cache, and each layer's memory: after all tokens, or with a
        cache after the last full segment.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding, which may be anywhere: it is neither read nor written, and has no
                position.
            document_ids: (B, T) integers from 0 that never decrease in a row: local attention and memory keep the
                documents of a packed row apart. None: each row is one document, which continues that of the cache.
            labels: (B, T), usually `input_ids`; shifted in this method. -100 is ignored.
            past_key_values, cache: the cache of an earlier call, by either name, whose text `input_ids` continue;
                `attention_mask` may be of these alone, or of all tokens since the start.
            use_cache: return a cache. None: if one is given, or as `config.use_cache` says outside of training and
                without labels. With gradient checkpointing it is set to False in training.
            use_memory: False switches the memory off: local attention alone, whatever the gates.
            memory_of: (B,) the row whose memory each row reads, as it is before the same segment; None: its own. All
                else stays with the row: its local attention, and what it writes to its own memory.
            loss_reduction: "mean" over the labels that are not ignored, "sum", or "none": (B, T - 1) losses of the next
                token.
            num_items_in_batch: the denominator of the mean, if these rows are a micro-batch of a batch.
            logits_to_keep: return logits of the last so many positions only, 0 for all; or a tensor of positions.
            return_logits: None: yes, except in training with labels, where a sequence's logits are never materialized
                (a tuple has them always).
            inputs_embeds: (B, T, E) in place of `input_ids`, as `transformer.wte` gives them.
            position_ids: (B, T) or (1, T). The model counts its own positions, so those that count tokens are ignored.
                If they start again from 0 in a row, as TRL packs documents, they give the `document_ids`.
            token_type_ids: accepted if all are 0, and ignored.
            output_hidden_states: return those of the embeddings and after each layer. None: as the configuration says.
            output_attentions: refused, since no attention probabilities exist.
            return_dict: False: a tuple in the order of transformers, without `memory`. None: as the configuration says.

        Raises:
            ValueError: an argument whose value this model has no meaning for, or a cache of another model or batch, or
                a cache in training with gradient checkpointing.
            TypeError: an unknown argument, unless transformers passes it to all models.
        """
        reject_unknown_arguments(unknown, position_ids, document_ids)
        reject_attentions(output_attentions, self.config)
        named = wants_dict(return_dict, self.config)
        if use_cache is None and labels is not None:
            use_cache = False
        if loss_reduction not in ("mean", "sum", "none"):
            raise ValueError(f"loss_reduction={loss_reduction!r} is not one of mean, sum, none")
        if return_logits is None:
            return_logits = labels is None or not self.training or not named
        context = self.transformer.prepare(
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
        grid, T = context.grid, context.input_ids.shape[1]
        targets = None if labels is None else grid.shift_labels(labels, IGNORE_INDEX)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        columns = torch.arange(T, device=context.input_ids.device)[kept] if return_logits else None
        if columns is not None and len(columns) > grid.S:
            columns = None  # so many that the hidden states of all tokens are kept until the end

        def loss_and_hidden(hidden: Tensor, slots: slice) -> tuple[Tensor | None, Tensor | None]:
            loss = None
            if targets is not None:
                block_targets = targets[:, slots]
                rows, row_targets = hidden.flatten(0, 1), block_targets.flatten()
                weight = plain_weight(self.lm_head, rows)
                if weight is not None and loss_reduction != "none":
                    loss = summed_loss(rows, weight, row_targets)
                else:
                    if weight is not None:
                        losses = token_losses(rows, weight, row_targets)
                    else:
                        losses = layer_losses(rows, self.lm_head, row_targets, self.config.vocab_size)
                    loss = losses.view(block_targets.shape) if loss_reduction == "none" else losses.sum()
            if columns is not None:
                hidden = grid.at_columns(columns, hidden, slots)
            return loss, hidden if return_logits else None

        outputs, memory, hidden_states = self.transformer.run_blocks(
            context, loss_and_hidden, self, output_hidden_states
        )
        losses, hidden = zip(*outputs, strict=True)
        loss = logits = None
        if targets is not None and loss_reduction == "none":
            loss = grid.from_slots(grid.join(losses), T)[:, :-1]
        elif targets is not None:
            loss = grid.sum(torch.stack(losses).sum())
            if loss_reduction == "mean":
                loss = loss / ((targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)
        if return_logits:
            if columns is None:
                of_columns = grid.from_slots(grid.join(hidden), T)[:, kept]
            else:
                of_columns = grid.sum(hidden[0] if len(hidden) == 1 else torch.stack(hidden).sum(0))
            logits = self.lm_head(of_columns)
        # In the order of their fields, since the third one has two names.
        output = InfiniCausalLMOutput(
            loss,  # type: ignore[arg-type]
            logits,
            context.cache,
            hidden_states=hidden_states,  # type: ignore[arg-type]
            memory=memory,
        )
        return as_requested(output, named)

    def compile_layers(self) -> None:
        """Compile each layer in place. All layers share one compilation; a new shape of a block costs another."""
        for layer in self.transformer.h:
            layer.compile()


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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_memory: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **unknown,
    ) -> InfiniSequenceClassifierOutput | tuple:
        """Return `logits` (B, C), and the mean `loss` if there are labels.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding, which may be anywhere. Without it no token is padding, whatever its
                id. A row of padding alone gets logits of 0.
            labels: (B,) floats for `config.problem_type` "regression" (C = 1), (B,) integers for
                "single_label_classification" (-100 is ignored), or (B, C) floats from 0 to 1 for
                "multi_label_classification". With problem_type None, their number and type decide.
            use_memory: False switches the memory off: local attention alone, whatever the gates.
            num_items_in_batch: the denominator of the mean for single labels, if these rows are a micro-batch.
            inputs_embeds, position_ids, token_type_ids, output_hidden_states, output_attentions, return_dict: as for
                `InfiniGPTNeoForCausalLM.forward`.

        Raises:
            ValueError: an argument whose value this model has no meaning for.
            TypeError: an unknown argument, unless transformers passes it to all models.
        """
        reject_unknown_arguments(unknown, position_ids)
        reject_attentions(output_attentions, self.config)
        context = self.transformer.prepare(
            input_ids,
            attention_mask,
            use_cache=False,
            use_memory=use_memory,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
        )
        B, T = context.input_ids.shape
        # Padding has no slot, so a row's tokens fill its slots from the first one on.
        last = context.input_ids.new_full((B,), T - 1) if attention_mask is None else attention_mask.bool().sum(1) - 1

        def last_hidden(hidden: Tensor, slots: slice) -> tuple[Tensor]:
            """Return the last token's hidden state (B, E), 0 where that token is in another block."""
            index = torch.arange(slots.start, slots.stop, device=hidden.device)
            return ((hidden * (index == last[:, None])[..., None]).sum(1),)

        outputs, memory, hidden_states = self.transformer.run_blocks(
            context, last_hidden, self.transformer, output_hidden_states
        )
        logits = self.score(context.grid.sum(torch.stack([hidden for (hidden,) in outputs]).sum(0)))
        loss = None
        if labels is not None:
            batch_size = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **batch_size)
        output = InfiniSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=hidden_states,  # type: ignore[arg-type]
            memory=memory,
        )
        return as_requested(output, wants_dict(return_dict, self.config))
