"""Our models as Qwen3 and Qwen3-Next, transformers' own architectures, where they compute the same function.

What has another form there and can be had all the same:

    eps         theirs has one for all norms. A norm of s x with s^2 eps is that of x with eps, so queries, keys and the
                residual stream are made s times as long by the weights before them.
    qk_norm     l2 is rms with weights of 1 / sqrt(K) and an eps of 1 / K.
    beta        inverse_temperature, if all heads have one, is in the weights of the norm of the queries.
    norms       Qwen3-Next's are 1 + weight.
    gate        of Qwen3-Next's attention: attention_to_qwen.
    inner size  theirs has one for all layers, the largest: swiglu_to_qwen.

Anything else that differs is refused, in a sentence.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3NextConfig

from models.build import settings_of
from models.language_model import LanguageModel
from models.mixers.mixer import Mixer
from models.parts.decay import NoDecay, ScalarDecay
from models.parts.features import Identity
from models.regression.linear import Delta
from models.regression.local import Softmax
from scripts.exporting.qwen_layers import (
    Heads,
    Weights,
    at,
    attention_to_qwen,
    delta_to_qwen,
    swiglu_to_qwen,
    under,
)

ARCHITECTURES = {"qwen3": "Qwen3", "qwen3_next": "Qwen3-Next"}
UNIT_EPS = 1e-6  # of the length of queries and keys in Qwen3-Next's delta rule, whatever its config says

# What a recipe may say: setting -> the values that theirs has, None for what is not given.
EITHER: dict[str, tuple[Any, ...]] = {"pairs": ("same",), "output_projection": (True,)}
ATTENTION = EITHER | {
    "conv_size": (0, 1),
    "activation": ("none",),
    "qk_norm": ("rms", "l2"),
    "feature_norm": ("none",),
    "output_norm": (False,),
    "num_key_heads": (None,),
    "regressor.kernel": ("gaussian",),
    "regressor.window": (None,),
    "regressor.skip_first": (False,),
}
DELTA = EITHER | {
    "conv_on": ("qkv",),
    "activation": ("silu",),
    "qk_norm": ("l2",),
    "rotary": (None,),
    "feature_norm": ("none", "l2"),
    "output_norm": (True,),
    "output_gate": ("silu",),
    "norm_eps": (UNIT_EPS,),
    "regressor.step": ("gradient",),
    "regressor.negative_eigenvalues": (False,),
    "regressor.gradient_before_decay": (False,),
}
PARTS = {"attention": (Softmax, NoDecay, ATTENTION), "delta rule": (Delta, ScalarDecay, DELTA)}


def settings(node: dict[str, Any], made: type) -> dict[str, Any]:
    """All settings of a class, those that its node leaves out too."""
    defaults = {name: p.default for name, p in settings_of(made).items()}
    return {name: node.get(name, None if default is inspect.Parameter.empty else default)
            for name, default in defaults.items()}  # fmt: skip


def kind(mixer: Any) -> str | None:
    """attention | delta rule, None for another."""
    if type(mixer) is not Mixer or type(mixer.features) is not Identity:
        return None
    return next((name for name, (regressor, decay, _) in PARTS.items()
                 if type(mixer.regressor) is regressor and type(mixer.decay) is decay), None)  # fmt: skip


def refusal(model: LanguageModel, to: str) -> str | None:
    """Why it is no `to`, qwen3 or qwen3_next, in a sentence; None if it is."""
    theirs = ARCHITECTURES[to]
    if model.config.feed_forward != "swiglu":
        return f"model.feed_forward={model.config.feed_forward}: {theirs} has swiglu alone"
    alike: dict[str, Any] = {}
    for block, name in zip(model.blocks, model.config.layers, strict=True):
        said = f"model.mixers.{name}"
        of = kind(block.mixer)
        if of is None or (of == "delta rule" and to == "qwen3"):
            has = "softmax attention" if to == "qwen3" else "softmax attention and the gated delta rule"
            return f"{said} is {_named(block.mixer)}: {theirs} has {has} alone, without features"
        node = model.config.mixers[name]
        found = settings(node, Mixer)
        found |= {f"regressor.{key}": value for key, value in settings(node["regressor"], PARTS[of][0]).items()}
        for key, allowed in PARTS[of][2].items():
            if found[key] not in allowed:
                return f"{said}.{key}={word(found[key])}: {theirs} has {' or '.join(map(word, allowed))} there"
        if (reason := (_attention if of == "attention" else _delta)(block.mixer, found, to)) is not None:
            return f"{said}.{reason}"
        for key, value in _shared(block.mixer, found, of).items():
            if alike.setdefault(key, value) != value:
                return f"{said}.{key.split()[-1]} differs from another layer's: {theirs} has one for all layers"
    return None


def _attention(mixer: Any, found: dict[str, Any], to: str) -> str | None:
    gates = ("none",) if to == "qwen3" else ("none", "sigmoid")
    if found["output_gate"] not in gates:
        return f"output_gate={found['output_gate']}: {' or '.join(gates)} is possible"
    if mixer.rotary is None:
        return "rotary=null: a base is needed, such as 10000.0"
    if to == "qwen3" and mixer.rotary_channels not in (None, mixer.key_dim):
        return f"rotary_channels={mixer.rotary_channels}: all of them turn in Qwen3; leave it out"
    if mixer.key_dim != mixer.value_dim:
        return f"value_dim={mixer.value_dim}: it must be key_dim={mixer.key_dim}"
    beta = mixer.regressor.beta(torch.zeros(1))
    if not torch.equal(beta, beta[:1].expand_as(beta)):
        return (
            "regressor.inverse_temperature=learned: each head has its own, and theirs share one; a number is possible"
        )
    return None


def _delta(mixer: Any, found: dict[str, Any], to: str) -> str | None:
    if mixer.convolution is None:
        return f"conv_size={found['conv_size']}: at least 2 is possible"
    if mixer.num_kv_heads != mixer.num_heads:
        return f"num_kv_heads={mixer.num_kv_heads}: it must be num_heads={mixer.num_heads}"
    bias = mixer.regressor.step_size.bias
    if bias is not None and bias.any():
        return "regressor.bias=true: step sizes have none there; only false is possible"
    return None


def _shared(mixer: Any, found: dict[str, Any], of: str) -> dict[str, Any]:
    """What all layers of a kind must have alike."""
    alike = {name: getattr(mixer, name) for name in ("num_heads", "num_kv_heads", "key_dim", "value_dim")}
    if of == "attention":
        alike |= {name: getattr(mixer, name) for name in ("rotary", "rotary_channels")}
    else:
        alike |= {"num_key_heads": mixer.values_per_key, "conv_size": found["conv_size"]}
        alike["output_norm_eps"] = _eps(mixer)
    return {f"{of} {name}": value for name, value in alike.items()}


def _eps(mixer: Any) -> float:
    """Of the norm of what is read, of reads scaled by 1 / sqrt(K)."""
    return float(f"{mixer.output_norm.eps / mixer.key_dim:.12g}")


def _named(mixer: Any) -> str:
    if type(mixer) is not Mixer:
        return type(mixer).__name__
    parts = (mixer.regressor, mixer.decay, mixer.features)
    return " with ".join(type(part).__name__ for part in parts)


def word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def as_qwen(model: LanguageModel, to: str, max_positions: int) -> PreTrainedModel:
    """transformers' model that computes what ours does, which `refusal` has let through. max_positions: a number for
    its config, which limits nothing.
    """
    c, blocks = model.config, model.blocks
    of = [kind(block.mixer) for block in blocks]
    deltas = [block.mixer for block, name in zip(blocks, of, strict=True) if name == "delta rule"]
    attentions = [block.mixer for block, name in zip(blocks, of, strict=True) if name == "attention"]
    eps = _eps(deltas[0]) if deltas else c.norm_eps
    given: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "intermediate_size": max(block.feed_forward.inner_size for block in blocks),
        "rms_norm_eps": eps,
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": max_positions,
        **{name: getattr(c, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")},
    }
    if attentions:
        first = attentions[0]
        turns, K = first.rotary_channels or first.key_dim, first.key_dim
        exact = int(K * (turns / K)) == turns  # theirs rounds the product down
        turning = {"partial_rotary_factor": turns / K if exact else math.nextafter(turns / K, 1.0)}
        rope = {"rope_type": "default", "rope_theta": first.rotary} | (turning if to == "qwen3_next" else {})
        heads = {"num_attention_heads": first.num_heads, "num_key_value_heads": first.num_kv_heads}
        given |= {**heads, "head_dim": first.key_dim, "rope_parameters": rope}
    if to == "qwen3":
        theirs: Any = Qwen3ForCausalLM(Qwen3Config(**given))
    else:
        from transformers import Qwen3NextForCausalLM  # here: it imports fla where that is installed, three seconds

        kinds = ["linear_attention" if name == "delta rule" else "full_attention" for name in of]
        theirs = Qwen3NextForCausalLM(
            Qwen3NextConfig(**given, **_delta_sizes(deltas), layer_types=kinds, num_experts=0)
        )
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    found = _weights(model, weights, of, to, eps, given["intermediate_size"])
    theirs.load_state_dict({name: weight.float() for name, weight in found.items()})
    theirs.generation_config = copy.deepcopy(model.generation_config)
    if not attentions:  # transformers asks the cache of an attention layer how long it is, and fails without one (5.23)
        theirs.config.use_cache = theirs.generation_config.use_cache = False
    return theirs.eval()


def _delta_sizes(mixers: list[Any]) -> dict[str, Any]:
    if not mixers:
        return {}
    first = mixers[0]
    return {
        "linear_num_key_heads": first.num_heads // first.values_per_key,
        "linear_num_value_heads": first.num_heads,
        "linear_key_head_dim": first.key_dim,
        "linear_value_head_dim": first.value_dim,
        "linear_conv_kernel_dim": first.convolution.width,
    }


def _weights(
    model: LanguageModel, ours: Weights, of: list[str | None], to: str, eps: float, inner_size: int
) -> Weights:
    """All of theirs, in float64. The residual stream is `longer` times as long as ours."""
    longer, centre = math.sqrt(eps / model.config.norm_eps), 1.0 if to == "qwen3_next" else 0.0
    tied = model.config.tie_embeddings
    embedding = ours["embedding.weight"] * longer
    found = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": ours["norm.weight"] / (longer if tied else 1) - centre,
        "lm_head.weight": embedding if tied else ours["head.weight"],
    }
    for i, (block, name) in enumerate(zip(model.blocks, of, strict=True)):
        each, mixer = under(ours, f"blocks.{i}."), block.mixer
        for part in ("mixer.output.weight", "feed_forward.output.weight"):
            each[part] = each[part] * longer
        norms = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "feed_forward_norm"}
        layer = {f"{theirs}.weight": each[f"{name}.weight"] - centre for theirs, name in norms.items()}
        layer |= at("mlp.", swiglu_to_qwen(under(each, "feed_forward."), inner_size))
        heads = Heads(mixer.num_heads, mixer.num_kv_heads, mixer.key_dim, mixer.value_dim)
        weights = under(each, "mixer.")
        if name == "attention":
            taken = attention_to_qwen(_rms(weights, mixer, eps), heads, gated=to == "qwen3_next")
            layer |= at("self_attn.", taken | {norm: taken[norm] - centre for norm in taken if "_norm" in norm})
        else:
            heads = heads._replace(num_groups=mixer.num_heads // mixer.values_per_key)
            layer |= at("linear_attn.", delta_to_qwen(weights, heads))
        found |= at(f"model.layers.{i}.", layer)
    return found


def _rms(weights: Weights, mixer: Any, eps: float) -> Weights:
    """Attention's weights for RMS norms of queries and keys with this eps, and a scale of 1 / sqrt(K)."""
    K, H, G = mixer.key_dim, mixer.num_heads, mixer.num_kv_heads
    is_rms = "q_norm.weight" in weights
    norm: Tensor = torch.full((K,), 1.0 if is_rms else K**-0.5, dtype=torch.float64)
    q_norm, k_norm = (weights.get(f"{name}.weight", norm) for name in ("q_norm", "k_norm"))
    longer = math.sqrt(eps / mixer.norm_eps * (1 if is_rms else K))
    projection = weights["projection.weight"].clone()
    projection[: (H + G) * K] *= longer
    beta = mixer.regressor.beta(torch.zeros(1, dtype=torch.float64))[0].item()
    scaled = {"q_norm.weight": q_norm * beta * math.sqrt(K), "k_norm.weight": k_norm}
    return weights | scaled | {"projection.weight": projection}
