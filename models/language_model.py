"""The language model: embedding -> blocks -> norm -> head. Decoder-only and pre-norm; what is particular is in its
mixers.

It is a transformers PreTrainedModel, so `save_pretrained`, `from_pretrained`, `generate`, and everything built on them
work. Its cache is the mixers' states: of constant size where the mixers are recurrent.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging as transformers_logging

from models.block import Block, feed_forward
from models.build import build
from models.loss import IGNORED, score, sum_nats
from models.mixers.mixer import State
from models.parts.norm import RMSNorm

transformers_logging.disable_progress_bar()  # over a single file of weights


class LanguageModelConfig(PretrainedConfig):
    """Sizes, and the recipe of each mixer as plain nested dictionaries, as conf/mixer has them.

    mixers     name -> recipe.    pattern   names, repeated until there are num_layers of them. feed_forward
    swiglu | persistent_memory (block.py).    feed_forward_size   its inner width; None derives it for each block so
    that all blocks have 12 D^2 parameters.
    """

    model_type = "test_time_regression"

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
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.mixers, self.pattern = mixers or {}, pattern or []
        self.feed_forward, self.feed_forward_size, self.norm_eps = feed_forward, feed_forward_size, norm_eps
        self.tie_embeddings = tie_embeddings
        kwargs.setdefault("tie_word_embeddings", tie_embeddings)
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[Any, Any]:
        """transformers' hook. Where a folder has no config.json, transformers would take the defaults above."""
        folder = Path(pretrained_model_name_or_path)
        if (folder.is_dir() or folder.is_absolute()) and not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not the folder of a model: it has no config.json")
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


class Cache:
    """The states of all layers, None at the start: what generate passes from one call to the next."""

    def __init__(self, states: Sequence[State | None]) -> None:
        self.states = states

    def reorder_cache(self, rows: Tensor) -> None:
        """Beam search: row i goes on from what was row rows[i]."""
        self.states = [_map_tensors(state, lambda t: t.index_select(0, rows)) for state in self.states]

    def get_seq_length(self) -> int:
        """Tokens seen, in the longest row."""
        return 0 if self.states[0] is None else int(self.states[0].position.max())

    @property
    def num_bytes(self) -> int:
        sizes: list[int] = []
        for state in self.states:
            _map_tensors(state, lambda t: sizes.append(t.numel() * t.element_size()))
        return sum(sizes)


class LanguageModel(PreTrainedModel, GenerationMixin):
    """A causal language model of LanguageModelConfig."""

    config_class = LanguageModelConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012, as transformers declares it
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        blocks = nn.ModuleList(_block(config, i, name) for i, name in enumerate(config.layers))
        self.blocks = cast("Sequence[Block]", blocks)  # torch says Module of what a list holds
        self.norm = RMSNorm(D, config.norm_eps)
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        self.init_weights_by_depth()
        self.post_init()

    @torch.no_grad()
    def init_weights_by_depth(self) -> None:
        """Matrices normal with standard deviation 1 / sqrt(inputs), so that widths do not matter; those that write into
        the residual stream divided by sqrt(2 L), so that its variance does not grow with the depth (Radford et al.
        2019). What a mixer's parts have set themselves (decays, convolutions, norms) stays.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                depth = 2 * self.config.num_layers if name.endswith(".output") else 1
                nn.init.normal_(module.weight, std=(module.in_features * depth) ** -0.5)
        nn.init.normal_(self.embedding.weight, std=self.config.hidden_size**-0.5)

    def _init_weights(self, module: nn.Module) -> None:
        """transformers' hook, called for each module: nothing is left to do, everything has been initialised where it
        was built.
        """

    def hidden(
        self, input_ids: Tensor, segments: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, list[State]]:
        """input_ids [B, T] -> what the head reads [B, T, D], and the states after the last token."""
        x = self.embedding(input_ids)
        states: list[State] = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if cache is None else cache.states[i], segments)
            states.append(state)
        return self.norm(x), states

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        segments: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """transformers' interface. labels are the input_ids themselves (shifted here), -100 to ignore. Padding, on
        either side, is treated as another document, which no token of the text sees; segments [B, T] number packed
        documents.
        """
        if segments is None and attention_mask is not None and not attention_mask.all():
            segments = _segments_of(attention_mask)[:, -input_ids.shape[1] :]
        hidden, states = self.hidden(input_ids, segments, past_key_values)
        loss = None
        if labels is not None:
            targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
            loss = sum_nats(hidden.flatten(0, 1), self.head.weight, targets) / (targets != IGNORED).sum().clamp(min=1)
        logits = self.head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        cache: Any = Cache(states) if use_cache else None  # of another kind than transformers' own
        return CausalLMOutputWithPast(loss, logits, cache)

    def sum_nats(self, input_ids: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """The sum over tokens of -log p(target), the logits never all at once. targets [B, T]: the token that comes
        after each, -100 to ignore.
        """
        hidden, _ = self.hidden(input_ids, segments)
        return sum_nats(hidden.flatten(0, 1), self.head.weight, targets.flatten())

    def score(self, input_ids: Tensor, targets: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-log p(target) of each token [B, T], 0 where ignored, and the likeliest token in its place [B, T]. No
        gradients.
        """
        with torch.no_grad():
            hidden, _ = self.hidden(input_ids, segments)
            nats, predictions = score(hidden.flatten(0, 1), self.head.weight, targets.flatten())
        return nats.view_as(targets), predictions.view_as(targets)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward: what the mixers and feed-forward layers count, and the head. The embedding is a look-up, not a
        product.
        """
        blocks = sum(b.mixer.flops_per_token(seq_len) + b.feed_forward.flops_per_token() for b in self.blocks)
        return blocks + 2 * self.head.weight.numel()

    def state_size(self, seq_len: int) -> int:
        """Numbers held per sequence after seq_len tokens, in all layers."""
        return sum(block.mixer.state_size(seq_len) for block in self.blocks)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """generate's hook: with states in hand, only the newest token goes in."""
        cache = kwargs.get("past_key_values")
        started = cache is not None and cache.get_seq_length() > 0
        return {
            "input_ids": input_ids[:, -1:] if started else input_ids,
            "attention_mask": kwargs.get("attention_mask"),
            "past_key_values": cache,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the states are made by the first call

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def _block(config: LanguageModelConfig, layer_index: int, name: str) -> Block:
    D = config.hidden_size
    # Only the project's own classes: a config may come with somebody else's checkpoint.
    mixer = build(config.mixers[name], targets=("models.",), hidden_size=D, layer_index=layer_index)
    return Block(D, mixer, feed_forward(config.feed_forward, D, mixer, config.feed_forward_size), config.norm_eps)


def _segments_of(attention_mask: Tensor) -> Tensor:
    """Numbers runs of equal mask values, so that padding and text are different documents. [B, T]"""
    return torch.nn.functional.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0)).cumsum(1)


def _map_tensors(node: Any, function: Any) -> Any:
    """function applied to every tensor in nested (named) tuples."""
    if isinstance(node, Tensor):
        return function(node)
    if isinstance(node, tuple):
        mapped = [_map_tensors(item, function) for item in node]
        return type(node)(*mapped) if hasattr(node, "_fields") else tuple(mapped)
    return node


AutoConfig.register(LanguageModelConfig.model_type, LanguageModelConfig)
AutoModelForCausalLM.register(LanguageModelConfig, LanguageModel)
