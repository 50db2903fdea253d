"""Text that goes on: transformers' `generate`, of which states take no step back."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from models import decoding
from models.cache import Cache


class StateGenerationMixin(GenerationMixin):
    """What the models here change of GenerationMixin. (transformers asks for that ending of the name.)"""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers', but for ways of it that take tokens back: a state has no token to take back."""
        given = inspect.signature(super().generate).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if given.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: generate goes on with input_ids, to which it adds tokens; leave it out")
        for name in ("segments", "seq_idx", "position_ids", "cu_seqlens", "cu_seq_lens_q"):
            if given.get(name) is not None:
                raise ValueError(f"{name}: generate goes on with one document a row; leave it out, and pad on the left")
        asked: dict[str, Any] = {}  # transformers takes from the model's config what the call's leaves None
        for config in (self.generation_config, given.get("generation_config")):
            if config is not None:
                asked |= {name: value for name, value in vars(config).items() if value is not None}
        asked |= given
        for name in ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"):
            if asked.get(name) is not None:
                raise ValueError(f"{name}: tokens that are refused must be taken back, and a state can't; leave it out")
        if (size := asked.get("prefill_chunk_size")) is not None:
            raise ValueError(
                f"prefill_chunk_size={size!r}: prompts are cut here where that saves memory, and as transformers cuts "
                "them tokens would be lost; leave it out"
            )
        if (kind := asked.get("cache_implementation")) is not None:
            raise ValueError(
                f"cache_implementation={kind!r}: the cache is the states of the mixers, of one kind; leave it out"
            )
        if asked.get("disable_compile"):
            with decoding.uncaptured():
                return super().generate(*args, **kwargs)
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """generate's hook: what a cache has seen does not go in again."""
        mask = kwargs.get("attention_mask")
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if not seen and not input_ids.shape[1]:
            raise ValueError(f"input_ids {list(input_ids.shape)}: a text goes on from one token at least")
        if seen >= input_ids.shape[1]:
            raise ValueError(
                f"the cache has seen {seen} tokens, and input_ids has {input_ids.shape[1]}; it must begin with those, "
                "and go on with at least one more"
            )
        first = kwargs.get("is_first_iteration", "next_sequence_length" not in kwargs)
        if mask is not None and first and not mask[:, -1].all():
            raise ValueError("a row ends with padding, where its text should go on; pad on the left to generate")
        if not first and seen:  # generate's own tokens are text, and the cache before them is wanted no more
            mask = None
            if isinstance(past_key_values, decoding.Held):
                past_key_values.spent = True
        asked = {name: True for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)}
        return asked | {
            "input_ids": input_ids[:, seen:],
            "attention_mask": mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the states are made by the first call
