"""The weights of Qwen3's and Qwen3-Next's layers (transformers, models/qwen3 and models/qwen3_next), and ours.

A weight is a matrix whose rows are its outputs. Ours has one matrix for queries, keys, values and gate, side by side.
Theirs has several, whose rows go head by head: of each key head its query, its key, and the values and gates of the
heads that it serves; or, in attention, of each head its query and its gate.

Functions come in pairs, `..._to_qwen` and `..._from_qwen`: weights by our names -> by theirs, and back.

Shapes: D model width, H heads, G key-value heads, N key heads, K key width, V value width, F inner width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


class Heads(NamedTuple):
    """num_heads, of which num_groups share keys and values (attention) or queries and keys (delta rule)."""

    num_heads: int
    num_groups: int
    key_dim: int
    value_dim: int

    @property
    def each(self) -> int:
        return self.num_heads // self.num_groups


def rows(weight: Tensor, heads: int, *widths: int) -> list[Tensor]:
    """The parts of a projection whose rows are, head by head, parts of these widths: [heads width, D] each."""
    return [part.flatten(0, 1) for part in weight.unflatten(0, (heads, sum(widths))).split(widths, dim=1)]


def by_head(heads: int, *parts: Tensor) -> Tensor:
    """The other way: parts [heads width, D] to rows that go head by head."""
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)


def attention_to_qwen(ours: Weights, heads: Heads, gated: bool) -> Weights:
    """gated: as Qwen3-Next's attention is. Where ours has no gate, sigmoid(0) = 1/2 is one."""
    H, G, K, V = heads
    widths = [H * K, G * K, G * V]
    query, key, value, *gate = ours["projection.weight"].split([*widths, len(ours["projection.weight"]) - sum(widths)])
    output = ours["output.weight"]
    if gated:
        has_gate = len(gate[0]) > 0
        query = by_head(H, query, gate[0] if has_gate else torch.zeros_like(query))
        output = output if has_gate else 2 * output
    named = {"q_proj": query, "k_proj": key, "v_proj": value, "o_proj": output}
    norms = {name: ours[f"{name}.weight"] for name in ("q_norm", "k_norm")}
    return {f"{name}.weight": weight for name, weight in (named | norms).items()}


def attention_from_qwen(theirs: Weights, heads: Heads, gated: bool) -> Weights:
    query, gate = theirs["q_proj.weight"], []
    if gated:
        query, *gate = rows(query, heads.num_heads, heads.key_dim, heads.value_dim)
    projection = torch.cat([query, theirs["k_proj.weight"], theirs["v_proj.weight"], *gate])
    norms = {f"{name}.weight": theirs[f"{name}.weight"] for name in ("q_norm", "k_norm")}
    return {"projection.weight": projection, "output.weight": theirs["o_proj.weight"], **norms}


DELTA = {  # theirs: ours, where nothing but the name differs
    "A_log": "decay.log_rate",
    "dt_bias": "decay.bias",
    "norm.weight": "output_norm.weight",
    "out_proj.weight": "output.weight",
}


def delta_to_qwen(ours: Weights, heads: Heads) -> Weights:
    H, N, K, V = heads
    parts = ours["projection.weight"].split([N * K, N * K, H * V, H * V])
    found = {theirs: ours[name] for theirs, name in DELTA.items()}
    step_size, decay = ours["regressor.step_size.weight"], ours["decay.projection.weight"]
    return found | {
        "in_proj_qkvz.weight": by_head(N, *parts),
        "in_proj_ba.weight": by_head(N, step_size, decay),
        "conv1d.weight": ours["convolution.weight"].unsqueeze(1),
    }


def delta_from_qwen(theirs: Weights, heads: Heads) -> Weights:
    _, N, K, V = heads
    step_size, decay = rows(theirs["in_proj_ba.weight"], N, heads.each, heads.each)
    return {name: theirs[other] for other, name in DELTA.items()} | {
        "projection.weight": torch.cat(rows(theirs["in_proj_qkvz.weight"], N, K, K, heads.each * V, heads.each * V)),
        "convolution.weight": theirs["conv1d.weight"].squeeze(1),
        "regressor.step_size.weight": step_size,
        "decay.projection.weight": decay,
    }


def swiglu_to_qwen(ours: Weights, inner_size: int) -> Weights:
    """inner_size: theirs; units that ours does not have get zeros, which add nothing."""
    gate, up = ours["up.weight"].chunk(2)
    more = inner_size - len(gate)
    return {
        "gate_proj.weight": F.pad(gate, (0, 0, 0, more)),
        "up_proj.weight": F.pad(up, (0, 0, 0, more)),
        "down_proj.weight": F.pad(ours["output.weight"], (0, more)),
    }


def swiglu_from_qwen(theirs: Weights) -> Weights:
    up = torch.cat([theirs["gate_proj.weight"], theirs["up_proj.weight"]])
    return {"up.weight": up, "output.weight": theirs["down_proj.weight"]}


def under(weights: Weights, prefix: str) -> Weights:
    """Those below a module, by their names there."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def at(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": weight for name, weight in weights.items()}
