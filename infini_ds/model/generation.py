"""How transformers' `generate()` uses the model: what a step gets, and that length is unlimited."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.utils import ModelOutput

from .arguments import one_cache
from .cache import CACHE_NAME, InfiniCache
from .configuration import InfiniGPTNeoConfig


class InfiniGenerationMixin(GenerationMixin):
    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates an InfiniCache

    def _prepare_position_ids_for_generation(self, *args, **kwargs) -> None:
        return None  # the model counts its own positions; those that transformers 5 infers do not know the cache's text

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

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, model_kwargs: dict, *args, **kwargs) -> dict:
        # The cache knows all that these say of the tokens it has read, and a new token is no padding and belongs to the
        # last document. Without them a step needs no mask, and transformers need not make them longer each time.
        if isinstance(outputs.get(CACHE_NAME), InfiniCache):
            for name in ("attention_mask", "document_ids", "position_ids"):
                model_kwargs.pop(name, None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def load_cache(self, path: str | Path) -> InfiniCache:
        """Return the cache that `InfiniCache.save` wrote to a file, for this model. Errors are those of its `load`."""
        return InfiniCache.load(path, self)  # type: ignore[arg-type]

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """Return what transformers' `generate()` returns, for a prompt with or without a cache.

        Args:
            past_key_values, cache: an `InfiniCache`, by either name. The prompt is all of its tokens and then new ones,
                as for every model of transformers, or new ones alone.
            prefill_chunk_size: read the prompt in pieces of so many tokens. The result is the same; `block_schedule`
                bounds the memory of a long prompt anyway.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if isinstance(cache, InfiniCache) and ids is not None and cache.columns:
            cache.check(self.config, ids.shape[0], self.dtype)  # type: ignore[attr-defined]
            cache.begin_generation(ids)
        settings = args[0] if args else kwargs.get("generation_config")
        chunk = kwargs.get("prefill_chunk_size") or getattr(settings or self.generation_config, "prefill_chunk_size", 0)
        if chunk and ids is not None and kwargs.get("inputs_embeds") is None:
            kwargs[CACHE_NAME] = self._read_in_chunks(ids, chunk, kwargs)
            kwargs["prefill_chunk_size"] = None
        return super().generate(inputs, *args, **kwargs)

    @torch.no_grad()
    def _read_in_chunks(self, ids: Tensor, size: int, kwargs: dict) -> InfiniCache:
        """Return a cache that has read all tokens of the prompt but the last one."""
        cache = kwargs.get(CACHE_NAME)
        if cache is None:
            cache = InfiniCache(self.config, len(ids), self.dtype, ids.device)  # type: ignore[attr-defined]
        if kwargs.get("attention_mask") is None:  # as transformers infers it
            config: InfiniGPTNeoConfig = self.config  # type: ignore[attr-defined]
            pad, end = config.pad_token_id, config.eos_token_id
            if pad is not None and pad != end and bool((ids == pad).any()):
                kwargs["attention_mask"] = (ids != pad).long()
        while (rest := ids.shape[1] - 1 - cache.get_seq_length()) > 0:
            read = ids[:, : cache.get_seq_length() + min(size, rest)]
            given = {name: kwargs.get(name) for name in ("attention_mask", "document_ids", "position_ids")}
            left = ids.shape[1] - read.shape[1]
            cut = {name: None if x is None else x[:, : x.shape[1] - left] for name, x in given.items()}
            step = self.prepare_inputs_for_generation(
                read, past_key_values=cache, use_memory=kwargs.get("use_memory", True), **cut
            )
            self(**step | {"use_cache": True, "logits_to_keep": 1})  # type: ignore[operator]
        return cache

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: InfiniCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: InfiniCache | None = None,
        **kwargs,
    ) -> dict:
        """Return the arguments of `forward` for the tokens that the cache has not read."""
        cache, done = one_cache(past_key_values, cache), 0
        if isinstance(cache, InfiniCache):
            rows, known = input_ids.shape[0], len(cache.memory_document)
            if rows != known and rows % known == 0:  # beams, or several texts of one prompt
                cache.batch_repeat_interleave(rows // known)
            done = cache.get_seq_length()
            if done >= input_ids.shape[1] > 0:
                # The prompt was given as embeddings, or PEFT put virtual tokens before it: the last id is the new one.
                done = input_ids.shape[1] - 1
                cache.offset = cache.columns - done
        new = input_ids.shape[1] - done
        as_embeds = inputs_embeds is not None and done == 0 and not getattr(cache, "columns", 0)
        if document_ids is not None:  # new tokens belong to the last document of the prompt
            added = input_ids.shape[1] - document_ids.shape[1]
            document_ids = torch.cat([document_ids, document_ids[:, -1:].expand(-1, max(added, 0))], dim=1)[:, done:]
        if position_ids is not None:  # those of the prompt; new tokens have none
            position_ids = position_ids[:, done:] if position_ids.shape[1] == input_ids.shape[1] else None
        return {
            "input_ids": None if as_embeds else input_ids[:, done:],
            "inputs_embeds": inputs_embeds if as_embeds else None,
            "attention_mask": attention_mask if attention_mask is None or as_embeds else attention_mask[:, -new:],
            "document_ids": document_ids,
            "position_ids": position_ids,
            CACHE_NAME: cache,
            "use_cache": kwargs.get("use_cache"),
            "use_memory": kwargs.get("use_memory", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
            "output_hidden_states": kwargs.get("output_hidden_states"),
            "output_attentions": kwargs.get("output_attentions"),
        }
