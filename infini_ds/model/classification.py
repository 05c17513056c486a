"""Infini-GPT-Neo with a head that puts a whole text into a class, or gives it a number.

Shapes: B batch, T tokens, E width, C labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from .configuration import InfiniGPTNeoConfig
from .memory import MemoryState
from .modeling import InfiniGPTNeoModel, InfiniGPTNeoPreTrainedModel, refuse_unknown


@dataclass
class InfiniSequenceClassifierOutput(ModelOutput):
    """`memory`: each layer's state after the last segment, as (M, z) pairs."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    memory: tuple[MemoryState, ...] | None = None


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
        run = self.transformer.start(input_ids, attention_mask, None, None, False, use_memory)
        B, T = input_ids.shape
        # Padding has no slot, so a row's tokens fill its slots from the first one on.
        last = input_ids.new_full((B,), T - 1) if attention_mask is None else attention_mask.bool().sum(1) - 1

        def head(hidden: Tensor, slots: slice) -> Tensor:
            """(B, slots of the block, E) -> (B, E): the last token's state, 0 where it is in another block."""
            places = torch.arange(slots.start, slots.stop, device=hidden.device)
            return (hidden * (places == last[:, None])[..., None]).sum(1)

        states, memory = self.transformer.run(input_ids, run, head)
        logits = self.score(torch.stack(states).sum(0))
        loss = None
        if labels is not None:
            of_parts = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **of_parts)
        return InfiniSequenceClassifierOutput(loss=loss, logits=logits, memory=memory)
