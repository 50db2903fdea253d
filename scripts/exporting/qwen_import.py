"""Qwen3 and Qwen3-Next as models of ours: the way back of qwen.py, for published checkpoints.

Every dense Qwen3 is one. Of Qwen3-Next the layers with experts are none, which all published ones have.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from models.language_model import LanguageModel, LanguageModelConfig
from scripts.exporting.qwen import ARCHITECTURES, UNIT_EPS
from scripts.exporting.qwen_layers import (
    Heads,
    Weights,
    at,
    attention_from_qwen,
    delta_from_qwen,
    swiglu_from_qwen,
    under,
)

SPECIAL = ("eos_token_id", "pad_token_id", "bos_token_id")
NAMES = {"full_attention": "attention", "linear_attention": "recurrent"}  # kind of layer: of our mixer


def refusal(config: Any) -> str | None:
    """Why a model of this config is none of ours, in a sentence; None if it is."""
    if config.model_type not in ARCHITECTURES:
        return f"model_type={config.model_type}: {' or '.join(ARCHITECTURES)} can be imported"
    rope = config.rope_parameters or {}
    for name, value, allowed in (
        ("hidden_act", config.hidden_act, "silu"),
        ("attention_bias", config.attention_bias, False),
        ("rope_parameters.rope_type", rope.get("rope_type", "default"), "default"),
    ):
        if value != allowed:
            return f"{name}={value}: only {allowed} can be imported"
    if others := sorted({*config.layer_types} - NAMES.keys()):
        return f"layer_types has {others[0]}: {' and '.join(NAMES)} can be imported"
    layers = range(config.num_hidden_layers)
    if config.model_type == "qwen3_next" and any(_has_experts(config, i) for i in layers):
        return f"num_experts={config.num_experts}: layers with experts can't be imported, only 0"
    return None


def _has_experts(config: Any, layer: int) -> bool:
    every = (layer + 1) % config.decoder_sparse_step == 0
    return config.num_experts > 0 and every and layer not in config.mlp_only_layers


def from_qwen(theirs: PreTrainedModel, num_ids: int | None = None) -> LanguageModel:
    """Our model that computes the same. num_ids: how many ids its tokenizer has, where the rest of the embedding, which
    stands for nothing, is to be left out. Raises ValueError where it can't be.
    """
    c: Any = theirs.config
    if (reason := refusal(c)) is not None:
        raise ValueError(reason)
    layers = [NAMES[kind] for kind in c.layer_types]
    period = next(n for n in range(1, len(layers) + 1) if all(x == layers[i % n] for i, x in enumerate(layers)))
    recipes = {"attention": attention, "recurrent": recurrent}
    special: dict[str, Any] = {name: getattr(c, name, None) for name in SPECIAL}
    config = LanguageModelConfig(
        **special,
        vocab_size=min(num_ids or c.vocab_size, c.vocab_size),
        hidden_size=c.hidden_size,
        num_layers=c.num_hidden_layers,
        mixers={name: recipes[name](c) for name in dict.fromkeys(layers)},
        pattern=layers[:period],
        feed_forward_size=c.intermediate_size,
        tie_embeddings=c.tie_word_embeddings,
        norm_eps=c.rms_norm_eps,
    )
    ours = LanguageModel(config)
    ours.load_state_dict(_weights(theirs.state_dict(), c, layers, config.vocab_size))
    return ours.eval()


def attention(c: Any) -> dict[str, Any]:
    """The recipe of its softmax layers."""
    rope, K = c.rope_parameters, c.head_dim
    turning = int(K * rope.get("partial_rotary_factor", 1.0)) if c.model_type == "qwen3_next" else K
    partial = {"rotary_channels": turning} if turning < K else {}
    gate = {"output_gate": "sigmoid"} if c.model_type == "qwen3_next" else {}
    return {
        "_target_": "models.mixers.Mixer",
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "key_dim": K,
        "value_dim": K,
        "qk_norm": "rms",
        "rotary": float(rope["rope_theta"]),
        "norm_eps": c.rms_norm_eps,
        **partial,
        **gate,
        "decay": _part("models.parts.decay.NoDecay"),
        "features": _part("models.parts.features.Identity"),
        "regressor": _part("models.regression.local.Softmax", inverse_temperature=K**-0.5),
    }


def recurrent(c: Any) -> dict[str, Any]:
    """The recipe of its layers with the gated delta rule."""
    return {
        "_target_": "models.mixers.Mixer",
        "num_heads": c.linear_num_value_heads,
        "num_key_heads": c.linear_num_key_heads,
        "key_dim": c.linear_key_head_dim,
        "value_dim": c.linear_value_head_dim,
        "conv_size": c.linear_conv_kernel_dim,
        "activation": "silu",
        "qk_norm": "l2",
        "feature_norm": "l2",
        "norm_eps": UNIT_EPS,
        "output_norm": True,
        "output_norm_eps": c.rms_norm_eps,
        "output_gate": "silu",
        "decay": _part("models.parts.decay.ScalarDecay"),
        "features": _part("models.parts.features.Identity"),
        "regressor": _part("models.regression.linear.Delta", bias=False),
    }


def _part(target: str, **settings: Any) -> dict[str, Any]:
    return {"_target_": target, "_partial_": True, **settings}


def _weights(theirs: Weights, c: Any, layers: list[str], num_ids: int) -> Weights:
    centre = 1.0 if c.model_type == "qwen3_next" else 0.0
    found = {
        "embedding.weight": theirs["model.embed_tokens.weight"][:num_ids],
        "head.weight": theirs["lm_head.weight"][:num_ids],
        "norm.weight": theirs["model.norm.weight"] + centre,
    }
    for i, name in enumerate(layers):
        each = under(theirs, f"model.layers.{i}.")
        layer = {
            "mixer_norm.weight": each["input_layernorm.weight"] + centre,
            "feed_forward_norm.weight": each["post_attention_layernorm.weight"] + centre,
            **at("feed_forward.", swiglu_from_qwen(under(each, "mlp."))),
        }
        if name == "attention":
            heads = Heads(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.head_dim)
            taken = attention_from_qwen(under(each, "self_attn."), heads, gated=c.model_type == "qwen3_next")
            taken |= {norm: taken[norm] + centre for norm in taken if "_norm" in norm}
        else:
            widths = (c.linear_key_head_dim, c.linear_value_head_dim)
            heads = Heads(c.linear_num_value_heads, c.linear_num_key_heads, *widths)
            taken = delta_from_qwen(under(each, "linear_attn."), heads)
        found |= at(f"blocks.{i}.", layer | at("mixer.", taken))
    return {name: weight.to(torch.float32) for name, weight in found.items()}
