"""What a language model is made of, as config.json holds it."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig


def refuse_folder(path: Any) -> None:
    """Raises ValueError for a folder that holds no model, or is not there."""
    folder = Path(path)
    if (folder.is_dir() or folder.is_absolute()) and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a model: it has no config.json")


def refuse_misspelt(others: dict[str, Any], own: list[str]) -> None:
    """Raises TypeError for a setting that is nearly one of ours, and none of transformers', which would be kept without
    a word and mean nothing. Others may be of transformers' later releases."""
    for name in others:
        near = get_close_matches(name, own, n=1, cutoff=0.8)
        if near and name not in ("tie_word_embeddings", *vars(PretrainedConfig())):
            raise TypeError(f"{name}={others[name]} is no setting of a LanguageModelConfig; did you mean {near[0]}?")


class LanguageModelConfig(PretrainedConfig):
    """Sizes, and the recipe of each mixer as plain nested dictionaries, as conf/mixer has them.

    mixers     name -> recipe.    pattern   names, repeated until there are num_layers of them. feed_forward
    swiglu | persistent_memory | in_place (block.py).    feed_forward_size   its inner width; None derives it for each
    block so that all blocks have 12 D^2 parameters.    feed_forward_grad_batch, feed_forward_step_size   of in_place,
    None for its own.
    """

    model_type = "test_time_regression"
    attribute_map = {"num_hidden_layers": "num_layers", "intermediate_size": "feed_forward_size"}  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 128,
        num_layers: int = 4,
        mixers: dict[str, dict[str, Any]] | None = None,
        pattern: list[str] | None = None,
        feed_forward: str = "swiglu",
        feed_forward_size: int | None = None,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-6,
        feed_forward_grad_batch: int | None = None,
        feed_forward_step_size: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.mixers, self.pattern = mixers or {}, pattern or []
        self.feed_forward, self.feed_forward_size, self.norm_eps = feed_forward, feed_forward_size, norm_eps
        self.feed_forward_grad_batch, self.feed_forward_step_size = feed_forward_grad_batch, feed_forward_step_size
        self.tie_embeddings = tie_embeddings
        refuse_misspelt(kwargs, [*inspect.signature(LanguageModelConfig).parameters])
        kwargs.setdefault("tie_word_embeddings", tie_embeddings)
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[Any, Any]:
        """transformers' hook. Where a folder has no config.json, transformers would take the defaults above."""
        refuse_folder(pretrained_model_name_or_path)
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @property
    def layers(self) -> list[str]:
        """The name of each layer's mixer. Raises ValueError for a pattern that names a mixer that is not there."""
        for name in self.pattern:
            if name not in self.mixers:
                raise ValueError(
                    f"model.pattern names {name!r}, and model.mixers has {', '.join(self.mixers) or 'none'}"
                )
        if not self.pattern:
            raise ValueError("model.pattern is empty; it names the mixers of the layers, for example [main]")
        return [self.pattern[i % len(self.pattern)] for i in range(self.num_layers)]
