"""Our models as those of flash-linear-attention (fla 0.6.0), where they compute the same function.

    ours (regressor, decay)          theirs
    linear, none                     LinearAttentionForCausalLM
    linear, fixed                    RetNetForCausalLM
    linear, channel                  GLAForCausalLM
    delta, none                      DeltaNetForCausalLM
    delta, scalar                    GatedDeltaNetForCausalLM
    delta, channel_rate              KDAForCausalLM

One kind in all layers, and swiglu. What has another form there and can be had all the same:

    reads       theirs scale queries by 1 / sqrt(K), so the eps of the reads' norm is ours / K.
    eps         theirs has one for all norms; the residual stream is made longer or shorter, as in qwen.py.
    gate        of KDA, through a bottleneck of V: one head's needs none, and no gate is sigmoid(0) = 1/2. kda_published
                has the bottleneck itself.
    inner size  theirs has one for all layers, the largest.

Anything else that differs is refused, in a sentence with the overrides of a model that would be the same.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from models.language_model import LanguageModel
from models.mixers.mixer import Mixer
from models.mixers.published import PublishedReadOut
from models.parts.decay import ChannelDecay, ChannelRateDecay, FixedDecay, NoDecay, ScalarDecay
from models.parts.features import ELU, Identity
from models.regression.linear import Delta, Linear
from scripts.exporting.fla_layers import layer
from scripts.exporting.qwen import UNIT_EPS, settings, word
from scripts.exporting.qwen_layers import Weights, at, swiglu_to_qwen, under

Recipe = dict[str, tuple[Any, ...]]  # setting -> the values that theirs has, None for what is not given


class Kind(NamedTuple):
    """A model of fla: its name, its class without ForCausalLM and Config, what recipes may say."""

    name: str
    made: str
    recipe: Recipe


ALL: Recipe = {"pairs": ("same",), "conv_on": ("qkv",), "output_projection": (True,), "output_norm": (True,)}
LINEAR = ALL | {
    "qk_norm": ("none",),
    "rotary": (None,),
    "feature_norm": ("none",),
    "num_key_heads": (None,),
    "regressor.writes": ("all",),
    "regressor.normalizer": (False,),
}
DELTA = ALL | {
    "activation": ("silu",),
    "qk_norm": ("l2",),
    "rotary": (None,),
    "feature_norm": ("l2", "none"),
    "norm_eps": (UNIT_EPS,),
    "regressor.step": ("gradient",),
    "regressor.gradient_before_decay": (False,),
}
KINDS = {
    (Linear, NoDecay): Kind(
        "linear attention",
        "LinearAttention",
        LINEAR
        | {
            "conv_size": (0, 1),
            "activation": ("none",),
            "output_gate": ("none",),
            "regressor.normalizer": (False, True),
        },
    ),
    (Linear, FixedDecay): Kind(
        "RetNet",
        "RetNet",
        LINEAR
        | {
            "conv_size": (0, 1),
            "activation": ("none",),
            "rotary": (10000.0,),
            "output_gate": ("silu", "none"),
            "decay.shortest": (5.0,),
        },
    ),
    (Linear, ChannelDecay): Kind(
        "GLA",
        "GLA",
        LINEAR | {"output_gate": ("silu", "none"), "decay.rank": (16,), "decay.temperature": (16.0,)},
    ),
    (Delta, NoDecay): Kind("DeltaNet", "DeltaNet", DELTA | {"num_key_heads": (None,), "output_gate": ("none", "silu")}),
    (Delta, ScalarDecay): Kind("Gated DeltaNet", "GatedDeltaNet", DELTA),
    (Delta, ChannelRateDecay): Kind("KDA", "KDA", DELTA | {"output_gate": ("none",), "decay.lower_bound": (None,)}),
}
READ_OUT: Recipe = {  # of KDA with its own shell
    "output_gate": ("sigmoid",),
    "gate_first": (False,),
    "read_norm": (None,),
    "skip": (False,),
    "stepped": (False,),
}
FEATURES = {Identity: "identity", ELU: "elu"}  # ours: linear attention's feature_map there
WIDEST = 256  # keys of a head, for its kernels
MAMBA2 = (
    "is Mamba-2's memory, and fla's Mamba-2 is another function: it has no feed-forward layers, writes with the step "
    "of the decay, adds D v to what is read, and norms all heads together after the gate; no recipe is the same"
)


def kind(mixer: Any) -> Kind | None:
    """Which model of theirs it might be."""
    if type(mixer) not in (Mixer, PublishedReadOut):
        return None
    found = KINDS.get((type(mixer.regressor), type(mixer.decay)))
    if type(mixer) is PublishedReadOut and (found is None or found.made != "KDA"):
        return None
    allowed = FEATURES if found is KINDS[Linear, NoDecay] else {Identity: "identity"}
    return found if type(mixer.features) in allowed else None


def refusal(model: LanguageModel) -> str | None:
    """Why it is no model of fla, in a sentence; None if it is."""
    if model.config.feed_forward != "swiglu":
        return f"model.feed_forward={model.config.feed_forward}: fla's models have swiglu alone"
    alike: dict[str, Any] = {}
    for block, name in zip(model.blocks, model.config.layers, strict=True):
        mixer, said = block.mixer, f"model.mixers.{name}"
        if (found := kind(mixer)) is None:
            return f"{said} {_another(mixer)}"
        if others := _differences(mixer, model.config.mixers[name], found):
            has = ", ".join(f"{key}={word(value)}" for key, (value, _) in others.items())
            node = model.config.mixers[name]
            overrides = " ".join(
                f"{_plus(key, node)}{said}.{key}={word(wanted)}" for key, (_, wanted) in others.items()
            )
            return f"{said} has {has}, which fla's {found.name} has not; with {overrides} a model would be the same"
        for key, value in _shared(mixer, found).items():
            if alike.setdefault(key, value) != value:
                return f"{said} differs from another layer's in {key}: fla has one for all layers"
    return None


def _another(mixer: Any) -> str:
    if type(mixer) is Mixer and type(mixer.regressor) is Linear and type(mixer.decay) is ScalarDecay:
        return MAMBA2
    parts = (mixer.regressor, mixer.decay, mixer.features) if isinstance(mixer, Mixer) else (mixer,)
    names = " with ".join(type(part).__name__ for part in parts)
    if isinstance(mixer, PublishedReadOut):
        kinds = [k.name for k in KINDS.values() if k.made != "KDA"]
        return (
            f"is {names} with what its published layer has around it, which only KDA's export knows; the model without "
            f"_published in its name may be one of fla's {', '.join(kinds)}"
        )
    return f"is {names}: a model of fla can be {', '.join(k.name for k in KINDS.values())}"


def _differences(mixer: Any, node: dict[str, Any], found: Kind) -> dict[str, tuple[Any, Any]]:
    """Setting -> what it is and what it would have to be."""
    said = settings(node, type(mixer))
    for part in ("regressor", "decay"):
        said |= {f"{part}.{name}": value for name, value in settings(node[part], type(getattr(mixer, part))).items()}
    allowed, others = dict(found.recipe), {}
    if found.made == "GLA":
        allowed["activation"] = ("none",) if mixer.convolution is None else ("silu",)
    if found.made == "RetNet":
        allowed["decay.longest"] = (mixer.num_heads + 4.0, None)
        allowed["rotary_channels"] = (None, mixer.key_dim)
    if found.made == "KDA":
        allowed["decay.rank"] = (None, mixer.value_dim)
        if type(mixer) is PublishedReadOut:
            allowed |= READ_OUT | {"gate_rank": (mixer.value_dim,)}
        elif mixer.num_heads == 1:
            allowed["output_gate"] = ("sigmoid", "none")
    for key, values in allowed.items():
        if said[key] not in values:
            others[key] = (said[key], values[0])
    bias = mixer.regressor.step_size.bias if type(mixer.regressor) is Delta else None
    if bias is not None and bias.any():
        others["regressor.bias"] = (True, False)
    if mixer.key_dim > WIDEST:
        others["key_dim"] = (mixer.key_dim, WIDEST)
    return others


def _plus(key: str, node: dict[str, Any]) -> str:
    """Before a setting that the recipe does not name Hydra wants a plus."""
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    return "" if last in node else "+"


def _shared(mixer: Any, found: Kind) -> dict[str, Any]:
    """What all layers must have alike, by the name of its setting."""
    r = mixer.regressor
    return {
        "its regressor and decay": found.name,
        **{name: getattr(mixer, name) for name in ("num_heads", "key_dim", "value_dim")},
        "num_key_heads": mixer.values_per_key,
        "conv_size": mixer.convolution and mixer.convolution.width,
        "features": type(mixer.features),
        "output_gate": mixer.gate,
        "output_norm_eps": _eps(mixer),
        "regressor.negative_eigenvalues": getattr(r, "largest_step", None),
        "regressor.normalizer": getattr(r, "normalizer", None),
    }


def _eps(mixer: Any) -> float:
    """Of the norm of what is read, of reads scaled by 1 / sqrt(K); the scale of a weighted mean cancels."""
    scale = 1 if getattr(mixer.regressor, "normalizer", False) else mixer.features.width
    return float(f"{mixer.output_norm.eps / scale:.12g}")


def as_fla(model: LanguageModel, max_positions: int) -> PreTrainedModel:
    """fla's model that computes what ours does, which `refusal` has let through. max_positions: a number for its
    config, which limits nothing. Raises ValueError where fla or Triton is not installed.
    """
    missing = [package for package in ("fla", "triton") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"--to fla: {missing[0]} is not installed; pip install flash-linear-attention triton")
    c, first = model.config, model.blocks[0].mixer
    found = kind(first)
    assert found is not None
    inner = max(block.feed_forward.inner_size for block in model.blocks)
    from fla import models as theirs

    config = getattr(theirs, f"{found.made}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        intermediate_size=inner,
        norm_eps=_eps(first),
        tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=max_positions,
        attn_mode="chunk",
        **{name: getattr(c, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")},
        **_sizes(first, found, c.hidden_size),
    )
    made: Any = getattr(theirs, f"{found.made}ForCausalLM")(config)
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    made.load_state_dict({name: w.float() for name, w in _weights(model, weights, found, inner).items()})
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def _sizes(first: Any, found: Kind, hidden_size: int) -> dict[str, Any]:
    """What the config says of the mixer."""
    H, K, V, r = first.num_heads, first.key_dim, first.value_dim, first.values_per_key
    gated, convolved = first.gate is not None, first.convolution is not None
    convolution = {"use_short_conv": convolved} | ({"conv_size": first.convolution.width} if convolved else {})
    beta = {"allow_neg_eigval": getattr(first.regressor, "largest_step", 1.0) == 2.0}
    wide = {"num_heads": H, "expand_k": H * K / hidden_size, "expand_v": H * V / hidden_size}
    exact = int(K * (V / K)) == V  # theirs rounds the product down
    by_head = {"head_dim": K, "expand_v": V / K if exact else math.nextafter(V / K, math.inf)}
    by_head |= {"num_heads": H // r, "num_v_heads": H if r > 1 else None}
    if found.made == "LinearAttention":
        features = FEATURES[type(first.features)]
        return wide | {"feature_map": features, "norm_feature_map": first.regressor.normalizer}
    if found.made in ("RetNet", "GLA"):
        return wide | {"use_output_gate": gated} | (convolution if found.made == "GLA" else {})
    if found.made == "DeltaNet":
        return wide | {"use_gate": gated} | convolution | beta
    if found.made == "GatedDeltaNet":
        gate = "sigmoid" if first.gate is torch.sigmoid else "swish"
        return by_head | {"use_gate": gated, "output_gate_activation": gate} | convolution | beta
    return by_head | convolution | beta


def _weights(model: LanguageModel, ours: Weights, found: Kind, inner_size: int) -> Weights:
    """All of theirs, in float64. The residual stream is `longer` times as long as ours."""
    longer, tied = math.sqrt(_eps(model.blocks[0].mixer) / model.config.norm_eps), model.config.tie_embeddings
    embedding = ours["embedding.weight"] * longer
    weights = {
        "model.embeddings.weight": embedding,
        "model.norm.weight": ours["norm.weight"] / (longer if tied else 1),
        "lm_head.weight": embedding if tied else ours["head.weight"],
    }
    for i, block in enumerate(model.blocks):
        each = under(ours, f"blocks.{i}.")
        for part in ("mixer.output.weight", "feed_forward.output.weight"):
            each[part] = each[part] * longer
        weights |= at(
            f"model.layers.{i}.",
            {
                "attn_norm.weight": each["mixer_norm.weight"],
                "mlp_norm.weight": each["feed_forward_norm.weight"],
                **at("mlp.", swiglu_to_qwen(under(each, "feed_forward."), inner_size)),
                **at("attn.", layer(under(each, "mixer."), block.mixer, found.made)),
            },
        )
    return weights
