"""Layers of transformers beside ours, by its own forms in PyTorch (which it takes where no kernels are installed)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scripts.exporting.qwen_layers import Heads, attention_from_qwen, delta_from_qwen
from scripts.published.plain import Layer, in_float64, varied
from scripts.published.weights import Weights, from_kimi, from_mamba, from_mamba2, from_olmo

D, H, K, V = 32, 2, 8, 16
LINEAR = {
    "linear_num_key_heads": H,
    "linear_num_value_heads": 2 * H,
    "linear_key_head_dim": K,
    "linear_value_head_dim": V,
}
GROUPED = {"num_heads": 2 * H, "num_key_heads": H, "key_dim": K, "value_dim": V}


class Peer(NamedTuple):
    """model: the folder of transformers.models. kind: of config and layer. settings: of its config. ours: overrides of
    our model's mixer. weights: (theirs, our mixer) -> ours.
    """

    model: str
    kind: tuple[str, str]
    settings: dict[str, Any]
    ours: dict[str, Any]
    weights: Callable[[Weights, Any], Weights]


def _delta(theirs: Weights, ours: Any) -> Weights:
    return delta_from_qwen(theirs, Heads(2 * H, H, K, V))


def _attention(theirs: Weights, ours: Any) -> Weights:
    return attention_from_qwen(theirs, Heads(4, 2, K, K), gated=False)


PEERS = {
    "gated_delta, 2 value heads a key head": Peer(
        "qwen3_next",
        ("Qwen3NextConfig", "Qwen3NextGatedDeltaNet"),
        LINEAR | {"rms_norm_eps": 1e-6, "layer_types": ["linear_attention"]},
        GROUPED | {"output_norm_eps": 1e-6},
        _delta,
    ),
    "gated_delta, steps up to 2": Peer(
        "olmo_hybrid",
        ("OlmoHybridConfig", "OlmoHybridGatedDeltaNet"),
        LINEAR
        | {
            "linear_num_value_heads": H,
            "linear_allow_neg_eigval": True,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
        {"key_dim": K, "value_dim": V, "regressor.negative_eigenvalues": True},
        from_olmo,
    ),
    "kda": Peer(
        "kimi_linear",
        ("KimiLinearConfig", "KimiLinearDeltaAttention"),
        {"linear_head_dim": D // H, "linear_num_heads": H, "layer_types": ["linear_attention"]},
        {},
        from_kimi,
    ),
    "mamba": Peer(
        "mamba",
        ("MambaConfig", "MambaMixer"),
        {"state_size": K, "time_step_rank": 3},
        {"state_dim": K, "step_rank": 3},
        from_mamba,
    ),
    "mamba2": Peer(
        "mamba2",
        ("Mamba2Config", "Mamba2Mixer"),
        {"num_heads": 4, "head_dim": 16, "state_size": K, "n_groups": 1, "chunk_size": 16},
        {"num_heads": 4, "value_dim": 16, "key_dim": K},
        from_mamba2,
    ),
    "softmax": Peer(
        "qwen3",
        ("Qwen3Config", "Qwen3Attention"),
        {
            "num_attention_heads": 4,
            "head_dim": K,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "attn_implementation": "sdpa",
        },
        {"num_heads": 4, "num_kv_heads": 2, "key_dim": K, "value_dim": K, "regressor.inverse_temperature": K**-0.5},
        _attention,
    ),
}


def built(peer: Peer) -> tuple[Layer, Callable[[Any], Weights]]:
    """Theirs, and what gives their weights to ours."""
    module = importlib.import_module(f"transformers.models.{peer.model}.modeling_{peer.model}")
    settings = importlib.import_module(f"transformers.models.{peer.model}.configuration_{peer.model}")
    config, layer = peer.kind
    config = getattr(settings, config)(**{"hidden_size": D, "num_hidden_layers": 1} | peer.settings)
    theirs = varied(getattr(module, layer)(config, 0))
    # where fla is installed a name stands for its kernel, around the form in PyTorch
    plain = {key: value.__wrapped__ for key, value in vars(module).items() if hasattr(value, "__wrapped__")}
    plain = {key: value for key, value in plain.items() if not isinstance(vars(module)[key], type)}

    def call(x: Tensor) -> Tensor:
        with in_float64(module, **plain):
            if peer.model != "qwen3":
                return theirs(x)
            positions = module.Qwen3RotaryEmbedding(config)(x, torch.arange(x.shape[1]).unsqueeze(0))
            return theirs(x, positions, None)[0]

    return call, partial(peer.weights, theirs.state_dict())
