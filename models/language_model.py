"""The language model: embedding -> blocks -> norm -> head. Decoder-only and pre-norm; what is particular is in its
mixers.

It is a transformers PreTrainedModel, so `save_pretrained`, `from_pretrained`, `generate`, and everything built on them
work. Its cache is the mixers' states: of constant size where the mixers are recurrent.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from models import decoding
from models.block import Block, add_and_norm, feed_forward, nothing
from models.build import build
from models.cache import Cache, alone, map_tensors
from models.calls import documents, refuse_documents, refuse_shapes, refuse_targets, refuse_unknown
from models.config import LanguageModelConfig, refuse_folder
from models.context import Context
from models.generation import StateGenerationMixin
from models.loss import IGNORED, score, sum_nats
from models.mixers.layer import State
from models.parts.linear import is_its_weight
from models.parts.norm import RMSNorm
from models.parts.precision import uncached, wide

PIECE = 24576  # tokens of a prompt that go through the layers at once on a GPU; more take memory and are no faster

transformers_logging.disable_progress_bar()  # over a single file of weights


class LanguageModel(PreTrainedModel, StateGenerationMixin):
    """A causal language model of LanguageModelConfig."""

    config_class = LanguageModelConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012, as transformers declares it
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> LanguageModel:
        """transformers', which with peft installed would first look for an adapter, and on the hub."""
        refuse_folder(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        blocks = nn.ModuleList(_block(config, i, name) for i, name in enumerate(config.layers))
        self.blocks = cast("Sequence[Block]", blocks)  # torch says Module of what a list holds
        self.norm = RMSNorm(D, config.norm_eps)
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        self.gradient_checkpointing = False  # transformers' switch, with the function that does it
        self.alike = False  # whether all blocks are called in one form: where they are compiled, each kind is once
        self.context: Context | None = None  # in a pass in which processes share their sequences
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
        """transformers' hook, called for each module, which has been initialised where it was built; and for a larger
        embedding or head, not yet in the model, whose new rows are initialised here.
        """
        if isinstance(module, nn.Embedding | nn.Linear) and all(module is not each for each in self.modules()):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)

    def hidden(
        self, input_ids: Tensor, segments: Tensor | None = None, cache: Cache | None = None, keep: bool = True
    ) -> tuple[Tensor, list[State]]:
        """input_ids [B, T] -> what the head reads [B, T, D], and the states after the last token, if kept."""
        states = self._states(cache)
        (hidden,) = self._layers(self.embedding(input_ids), segments, states, keep=keep)
        return hidden, cast("list[State]", states)

    def _layers(
        self,
        x: Tensor,
        segments: Tensor | None,
        states: list[State | None],
        every: bool = False,
        keep: bool = True,
        buffers: decoding.Buffers | None = None,
    ) -> tuple[Tensor, ...]:
        """What each block is given, where every is wanted, and at last what the head is. The states become those after
        the last token, each as soon as it is there, where they are kept; in the buffers if there are any. x is nobody
        else's then, and may be overwritten.
        """
        ring = self.context is not None and all(block.rings for block in self.blocks)
        keep = keep if self.context is None else not ring
        each, y = [], nothing(x) if self.alike or buffers is not None else None
        for i, block in enumerate(self.blocks):
            if every:
                each.append(x if y is None else x + y)
            if self.context is not None:
                states[i] = self.context.elsewhere(block.mixer, segments) if ring else self.context.receive(x)
            if self.gradient_checkpointing and self.training:
                x, y, state = self._gradient_checkpointing_func(block.__call__, x, y, states[i], segments, keep)
            else:
                x, y, state = block(x, y, states[i], segments, keep, buffers is not None)
            if state is None:
                continue
            if self.context is not None:
                x = self.context.hand_on(x, state)
            held = torch.is_grad_enabled() or torch.compiler.is_compiling()  # the one by the graph of gradients
            states[i] = state if held else alone(state) if buffers is None else buffers.keep(i, state)
        return (*each, add_and_norm(x, y, self.norm)[1])

    def _states(self, cache: Cache | None) -> list[State | None]:
        """A list to go on with, which is nobody else's."""
        return [None] * len(self.blocks) if cache is None else list(cache.states)

    def _embedded(self, given: Tensor) -> Tensor:
        """input_ids [B, T] or inputs_embeds [B, T, D] as a tensor of its own [B, T, D]."""
        return given.clone() if given.is_floating_point() else self.embedding(given)

    def piece(self, given: Tensor) -> int:
        """How many tokens of each row of a prompt go through the layers at once: on a GPU no more than it needs to be
        busy, and as many each time. States that grow are not gathered anew for each piece.
        """
        rows, length = given.shape[:2]
        grows = self.state_size(1 << 40) > self.state_size(1 << 39)
        pieces = 1 if grows or not given.is_cuda else max(1, -(-rows * length // PIECE))
        return max(64, -(-length // (pieces * 16)) * 16)

    def _in_pieces(
        self, given: Tensor, segments: Tensor | None, cache: Cache | None, use_cache: bool
    ) -> tuple[Tensor, Cache]:
        """What the head reads of the last tokens, and the cache, where nothing else is wanted: a long prompt, a piece
        at a time, without copies of all weights in the dtype of autocast. Where a step is captured, states lie there,
        and the first pieces may be captured too.
        """
        states, seen = self._states(cache), 0 if cache is None else cache.get_seq_length()
        fresh = use_cache and seen == 0
        with decoding.places(self, given) if fresh else nullcontext() as step, uncached(given.device):
            buffers = None if step is None else step.buffers
            hidden, start = (None, 0) if step is None else step.read(self, given, segments)
            if buffers is not None and start:
                states = list(buffers.states)
            size = self.piece(given[:, start:])
            for first in range(start, given.shape[1], size):
                now = slice(first, first + size)
                told = None if segments is None else segments[:, now]
                (hidden,) = self._layers(self._embedded(given[:, now]), told, states, buffers=buffers)
            assert hidden is not None  # of one token at least
            seen += given.shape[1]
            if buffers is None:
                return hidden, Cache(states, seen)
            if all(x is y for x, y in zip(states, buffers.states, strict=True)):
                return hidden, decoding.Held(buffers, len(given), seen, prompt=True)
            pairs = zip(states, buffers.states, strict=True)
            return hidden, Cache([map_tensors(x, Tensor.clone) if x is y else x for x, y in pairs], seen)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        segments: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """transformers' interface. Keywords that mean nothing here are an error (calls.py).

        labels: the input_ids themselves (shifted here), -100 to ignore; shift_labels: shifted already. The loss is the
        mean over those that count, or their sum / num_items_in_batch, with which Trainer accumulates.
        segments [1 or B, T] number packed documents; or attention_mask, position_ids, seq_idx or cu_seqlens tell them
        (calls.documents). logits_to_keep: of so many last tokens (0: all), or of these places. output_hidden_states:
        what each block is given, and what the head is.
        """
        # not a parameter: Trainer evaluates only where all parameters with "label" in their names are in the batch
        targets: Tensor | None = others.pop("shift_labels", None)
        if others:
            refuse_unknown(others, [name for name in inspect.signature(self.forward).parameters if name != "others"])
        said = {"labels": labels, "shift_labels": targets}
        refuse_shapes(input_ids, inputs_embeds, said, past_key_values, self.config.hidden_size)
        if targets is None and labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        refuse_targets("shift_labels" if labels is None else "labels", targets, self.config.vocab_size)
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        told = {
            "position_ids": position_ids,
            "seq_idx": seq_idx,
            "cu_seqlens": cu_seqlens,
            "cu_seq_lens_q": cu_seq_lens_q,
        }
        refuse_documents(told | {"attention_mask": attention_mask, "segments": segments}, others, given, seen)
        if segments is None:
            ends = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
            number = None if past_key_values is None else past_key_values.segment
            segments = documents(given, attention_mask, position_ids, seq_idx, ends, seen, number)
        else:
            segments = segments.expand(given.shape[:2])
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        plain = targets is None and not wanted and isinstance(logits_to_keep, int)
        if plain and use_cache and seen and input_ids is not None and input_ids.shape[1] == 1 and segments is None:
            assert past_key_values is not None
            if (step := decoding.go_on(self, input_ids, past_key_values)) is not None:
                found = CausalLMOutputWithPast(None, step[0], cast("Any", step[1]))
                return found.to_tuple() if return_dict is False else found
        cache: Any  # of another kind than transformers' own
        if plain and logits_to_keep == 1 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            hidden, cache = self._in_pieces(given, segments, past_key_values, bool(use_cache))
        else:
            states = self._states(past_key_values)
            each = self._layers(self._embedded(given), segments, states, bool(wanted))
            hidden, cache = each[-1], Cache(states, seen + given.shape[1])
        loss = None
        if targets is not None:
            self._warn_of_tied_adapters()
            counted = (targets != IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            loss = self._sum_nats(hidden, targets) / counted.to(hidden.device).clamp(min=1)  # none at all is no loss
        if isinstance(logits_to_keep, Tensor):
            logits = self.head(hidden[:, logits_to_keep])
        else:
            logits = self.head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        found = CausalLMOutputWithPast(loss, logits, cache if use_cache else None, each if wanted else None)
        return found.to_tuple() if return_dict is False else found

    def sum_nats(self, input_ids: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """The sum over tokens of -log p(target), the logits never all at once. targets [B, T]: the token that comes
        after each, -100 to ignore.
        """
        return self._sum_nats(self.hidden(input_ids, segments, keep=False)[0], targets)

    def _sum_nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if is_its_weight(self.head):
            return sum_nats(hidden, self.head.weight, targets)
        return F.cross_entropy(wide(self.head(hidden)), targets, ignore_index=IGNORED, reduction="sum")

    def _warn_of_tied_adapters(self) -> None:
        """Of one weight that has an adapter as a head, or as an embedding. (peft's adapters give the weight that they
        stand before as theirs.)
        """
        adapted = type(self.head) is not nn.Linear or type(self.embedding) is not nn.Embedding
        if adapted and getattr(self.head, "weight", None) is getattr(self.embedding, "weight", self):
            warnings.warn(
                "an adapter stands before the embedding or the head, which are one weight: merged, it will change "
                "both; leave it unmerged, or train a model with tie_embeddings=False",
                stacklevel=3,
            )

    def score(self, input_ids: Tensor, targets: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-log p(target) of each token [B, T], 0 where ignored, and the likeliest token in its place [B, T]. No
        gradients.
        """
        with torch.no_grad():
            hidden, flat = self.hidden(input_ids, segments)[0].flatten(0, 1), targets.flatten()
            if is_its_weight(self.head):
                nats, predictions = score(hidden, self.head.weight, flat)
            else:
                logits = wide(self.head(hidden))
                nats = F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="none")
                predictions = logits.argmax(-1)
        return nats.view_as(targets), predictions.view_as(targets)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward: what the mixers and feed-forward layers count, and the head. The embedding is a look-up, not a
        product.
        """
        return sum(block.flops_per_token(seq_len) for block in self.blocks) + 2 * self.head.weight.numel()

    def state_size(self, seq_len: int) -> int:
        """Numbers held per sequence after seq_len tokens, in all layers."""
        return sum(block.state_size(seq_len) for block in self.blocks)

    def train(self, mode: bool = True) -> LanguageModel:
        """torch's; training wants the memory that a captured step holds."""
        if mode:
            decoding.forget(self)
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_input_embeddings(self, value: Any) -> None:
        self.embedding = value

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.head = new_embeddings


def _block(config: LanguageModelConfig, layer_index: int, name: str) -> Block:
    D = config.hidden_size
    # Only the project's own classes: a config may come with somebody else's checkpoint.
    mixer = build(config.mixers[name], targets=("models.",), hidden_size=D, layer_index=layer_index)
    own = (config.feed_forward_size, config.feed_forward_grad_batch, config.feed_forward_step_size)
    return Block(D, mixer, feed_forward(config.feed_forward, D, mixer, *own), config.norm_eps)


AutoConfig.register(LanguageModelConfig.model_type, LanguageModelConfig)
AutoModelForCausalLM.register(LanguageModelConfig, LanguageModel)
# Trainer shifts labels that it smooths itself for the classes that are named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LanguageModelConfig.model_type] = LanguageModel.__name__
