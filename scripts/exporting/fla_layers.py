"""The weights of fla's layers (fla/layers), from ours.

Theirs has a matrix each for queries, keys, values and gate, where ours stand side by side in one, and a convolution
each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scripts.exporting.qwen_layers import Weights

NORM = {"LinearAttention": "norm", "DeltaNet": "o_norm", "GatedDeltaNet": "o_norm", "KDA": "o_norm"}
DECAY = {  # theirs: ours, where nothing but the name differs
    "GLA": {
        "gk_proj.0.weight": "decay.projection.weight",
        "gk_proj.1.weight": "decay.expansion.weight",
        "gk_proj.1.bias": "decay.expansion.bias",
    },
    "GatedDeltaNet": {
        "a_proj.weight": "decay.projection.weight",
        "A_log": "decay.log_rate",
        "dt_bias": "decay.bias",
    },
    "KDA": {
        "f_proj.0.weight": "decay.projection.weight",
        "f_proj.1.weight": "decay.expansion.weight",
        "A_log": "decay.log_rate",
        "dt_bias": "decay.bias",
    },
}


def layer(ours: Weights, mixer: Any, made: str) -> Weights:
    """made: the kind of theirs, by fla_models.KINDS."""
    gate_rows = len(ours["projection.weight"]) - sum(mixer.sizes)
    *pairs, gate = ours["projection.weight"].split([*mixer.sizes, gate_rows])
    found = {f"{name}_proj.weight": weight for name, weight in zip("qkv", pairs, strict=True)}
    if mixer.convolution is not None:
        each = ours["convolution.weight"].split(mixer.sizes)
        found |= {f"{name}_conv1d.weight": weight.unsqueeze(1) for name, weight in zip("qkv", each, strict=True)}
    found |= {theirs: ours[name] for theirs, name in DECAY.get(made, {}).items()}
    if "regressor.step_size.weight" in ours:
        found["b_proj.weight"] = ours["regressor.step_size.weight"]
    norm = NORM.get(made, "g_norm" if mixer.gate is None else "g_norm_swish_gate")
    found[f"{norm}.weight"] = ours["output_norm.weight"]
    output = ours["output.weight"]
    if "gate_projection.0.weight" in ours:
        names = ("0.weight", "1.weight", "1.bias")
        found |= {f"g_proj.{name}": ours[f"gate_projection.{name}"] for name in names}
    elif made == "KDA":
        found |= _narrow_gate(gate, mixer.num_heads * mixer.value_dim, mixer.value_dim)
        output = output if gate_rows else 2 * output
    elif gate_rows:
        found["g_proj.weight"] = gate
    return found | {"o_proj.weight": output}


def _narrow_gate(gate: Tensor, outputs: int, width: int) -> Weights:
    """Through a bottleneck as wide as one head's values: that head's own gate, or for no gate zeros, of which the
    sigmoid is 1/2."""
    narrow = gate if len(gate) else gate.new_zeros(width, gate.shape[1])
    expansion = torch.eye(width, dtype=gate.dtype) if len(gate) else gate.new_zeros(outputs, width)
    return {
        "g_proj.0.weight": narrow,
        "g_proj.1.weight": expansion,
        "g_proj.1.bias": gate.new_zeros(outputs),
    }
