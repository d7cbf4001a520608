"""`generate` for the causal models, with and without a cache."""

from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerationMode

from .cache import CACHE, HyenaCache


class HyenaGenerationMixin(GenerationMixin):
    """The methods by which transformers' `generate` learns of [`HyenaCache`].

    With `use_cache=True`, the default, a token costs a step of one position; with `use_cache=False`, or in training
    mode, a forward pass over the whole sequence. Both give the same logits, to rounding.

    Logits and scores have `config.vocab_size` columns, as transformers takes for granted in some places: the rows that
    pad the vocabulary name no token, and none of them is ever generated.
    """

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)
        cache = model_kwargs.get(CACHE)
        if cache is None:
            # A copy of the user's configuration, which the decoding loop reads next.
            generation_config.use_cache = generation_config.use_cache is not False and not self.training
            if not generation_config.use_cache:
                return
            cache = model_kwargs[CACHE] = HyenaCache(self.config)
        if generation_config.is_assistant or generation_mode == GenerationMode.ASSISTED_GENERATION:
            cache.activate_past_recording()

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        for processor in processors:
            # It calls the model itself, with arguments of its own.
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                processor.model = partial(self, vocab_to_keep=self.config.vocab_size)
        return processors

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: HyenaCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        cache: HyenaCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Passes the new tokens with a cache, the whole sequence without. A prompt is `input_ids` or `inputs_embeds`.

        Raises:
            ValueError: If the prompt is both.
        """
        if inputs_embeds is not None and is_first_iteration and input_ids.shape[1]:
            raise ValueError("A prompt is either input_ids or inputs_embeds, not both.")
        past = cache if past_key_values is None else past_key_values
        if past is not None:
            inputs = super().prepare_inputs_for_generation(
                input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                is_first_iteration=is_first_iteration,
                **{CACHE: past},
                **kwargs,
            )
        elif inputs_embeds is None:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        else:
            generated = self.get_input_embeddings()(input_ids)
            inputs = {"inputs_embeds": torch.cat([inputs_embeds, generated], dim=1), "attention_mask": attention_mask}
        return {**inputs, "vocab_to_keep": self.config.vocab_size}
