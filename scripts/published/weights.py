"""The weights of published layers by the names of ours. (Qwen3-Next's: scripts/exporting/qwen_layers.py.)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]

FLA = {  # theirs: ours
    "b_proj.weight": "regressor.step_size.weight",
    "A_log": "decay.log_rate",
    "dt_bias": "decay.bias",
    "a_proj.weight": "decay.projection.weight",
    "a_proj.bias": "decay.projection.bias",
    "f_proj.weight": "decay.projection.weight",
    "f_proj.bias": "decay.projection.bias",
    "f_proj.0.weight": "decay.projection.weight",
    "f_proj.1.weight": "decay.expansion.weight",
    "gk_proj.0.weight": "decay.projection.weight",
    "gk_proj.1.weight": "decay.expansion.weight",
    "gk_proj.1.bias": "decay.expansion.bias",
    "g_proj.0.weight": "gate_projection.0.weight",
    "g_proj.1.weight": "gate_projection.1.weight",
    "g_proj.1.bias": "gate_projection.1.bias",
    "o_norm.weight": "output_norm.weight",
    "g_norm_swish_gate.weight": "output_norm.weight",
    "o_proj.weight": "output.weight",
}
MESA = {"b_proj.weight": "regressor.write_weight.weight", "b_proj.bias": "regressor.write_weight.bias"}


def from_fla(theirs: Weights, ours: Any) -> Weights:
    """Of a layer of fla, for a mixer of ours."""
    rest = {key: value for key, value in theirs.items() if ".inv_freq" not in key}
    rows = [rest.pop(f"{name}_proj.weight") for name in ("q", "k", "v", "g") if f"{name}_proj.weight" in rest]
    found = {"projection.weight": torch.cat(rows)}
    filters = [rest.pop(f"{name}_conv1d.weight") for name in "qkv" if f"{name}_conv1d.weight" in rest]
    if filters:
        found["convolution.weight"] = torch.cat(filters).squeeze(1)
    names = dict(FLA)
    if "lambda_params" in rest:
        found["regressor.ridge"] = rest.pop("lambda_params").view(ours.num_heads, -1)
        names |= MESA | {"o_norm.weight": "read_norm.weight"}
    if "r_proj.weight" in rest:
        found["regressor.probe.weight"] = -rest.pop("r_proj.weight")  # their probe points the other way
    return found | {names[key]: value for key, value in rest.items()}


def from_kimi(theirs: Weights, ours: Any) -> Weights:
    """Of transformers' KimiLinearDeltaAttention, whose output gate has no bias."""
    t = theirs
    return {
        "projection.weight": torch.cat([t[f"{name}_proj.weight"] for name in "qkv"]),
        "convolution.weight": t["conv1d.weight"].squeeze(1),
        "decay.projection.weight": t["forget_gate.f_a_proj.weight"],
        "decay.expansion.weight": t["forget_gate.f_b_proj.weight"],
        "decay.log_rate": t["forget_gate.A_log"].flatten(),
        "decay.bias": t["forget_gate.dt_bias"],
        "regressor.step_size.weight": t["b_proj.weight"],
        "gate_projection.0.weight": t["g_a_proj.weight"],
        "gate_projection.1.weight": t["g_b_proj.weight"],
        "gate_projection.1.bias": torch.zeros_like(t["g_b_proj.weight"][:, 0]),
        "output_norm.weight": t["o_norm.weight"],
        "output.weight": t["o_proj.weight"],
    }


def from_olmo(theirs: Weights, ours: Any) -> Weights:
    """Of transformers' OlmoHybridGatedDeltaNet."""
    rest = dict(theirs)
    found = {"convolution.weight": rest.pop("conv1d.weight").squeeze(1)}
    found["projection.weight"] = torch.cat([rest.pop(f"{name}_proj.weight") for name in "qkvg"])
    return found | {FLA[key]: value for key, value in rest.items()}


def from_mamba2(theirs: Weights, ours: Any) -> Weights:
    """Of transformers' Mamba2Mixer: C, B and x are queries, keys and values."""
    q, k, v = ours.sizes
    z, x, B, C, dt = theirs["in_proj.weight"].split([v, v, k, q, ours.num_heads])

    def turned_round(weight: Tensor) -> Tensor:
        return torch.cat(weight.split([v, k, q])[::-1])

    return {
        "projection.weight": torch.cat([C, B, x, z]),
        "convolution.weight": turned_round(theirs["conv1d.weight"]).squeeze(1),
        "conv_bias": turned_round(theirs["conv1d.bias"]),
        "decay.projection.weight": dt,
        "decay.log_rate": theirs["A_log"],
        "decay.bias": theirs["dt_bias"],
        "skip": theirs["D"],
        "read_norm.weight": theirs["norm.weight"],
        "output.weight": theirs["out_proj.weight"],
    }


def from_mamba(theirs: Weights, ours: Any) -> Weights:
    """Of transformers' MambaMixer."""
    names = {
        "in_proj.weight": "projection.weight",
        "conv1d.bias": "conv_bias",
        "x_proj.weight": "selection.weight",
        "dt_proj.weight": "step_weight",
        "dt_proj.bias": "step_bias",
        "A_log": "log_rate",
        "D": "skip",
        "out_proj.weight": "output.weight",
    }
    rest = dict(theirs)
    found = {"convolution.weight": rest.pop("conv1d.weight").squeeze(1)}
    return found | {names[key]: value for key, value in rest.items()}
