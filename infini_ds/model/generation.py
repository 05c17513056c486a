"""How transformers' `generate()` uses the model: what a step gets, and that length is unlimited."""

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList

from .cache import InfiniCache


class InfiniGenerationMixin(GenerationMixin):
    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates an InfiniCache

    def _get_stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if hasattr(criterion, "max_position_embeddings"):
                criterion.max_position_embeddings = None  # used for a warning alone; it does not limit this model
        return criteria

    def _prepare_generated_length(  # type: ignore[override]
        self, generation_config: GenerationConfig, has_default_max_length: bool, **kwargs
    ) -> GenerationConfig:
        # transformers' default of 20 new tokens, which it would cut off at max_position_embeddings.
        if has_default_max_length and generation_config.max_new_tokens is None and generation_config.max_length == 20:
            generation_config.max_new_tokens = 20
        return super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length, **kwargs
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: InfiniCache | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        **kwargs,
    ) -> dict:
        """Return the arguments of `forward` for the tokens that the cache has not seen."""
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
