"""Layers of flash-linear-attention (fla 0.6.0, fla/layers) beside ours. Their forward passes run as they are; their
kernels are replaced by fla's own definitions in PyTorch (fla/ops/*/naive.py), since there is no GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.published.plain import Layer, in_float64, unit, varied, without_kernels
from scripts.published.weights import Weights, from_fla

D, H, K, V = 32, 2, 8, 16  # of the layers that are compared


class Peer(NamedTuple):
    """layer: the module and class in fla.layers. settings: of theirs. ours: overrides of our model's mixer. op: the
    kernel that it calls, and what computes the same: (module under fla.ops, definition -> the kernel's function).
    """

    layer: tuple[str, str]
    settings: dict[str, Any]
    ours: dict[str, Any]
    op: tuple[str, str, Callable[..., Callable[..., Any]]]


def _gated_delta(definition: Any) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor, **options: Any):
        each = v.shape[2] // q.shape[2]
        q, k = (unit(x).repeat_interleave(each, dim=2) for x in (q, k))
        beta = beta.sigmoid() * (2 if options["allow_neg_eigval"] else 1)
        return definition(q, k, v, beta, -A_log.exp() * F.softplus(g + dt_bias))

    return call


def _kda(definition: Any) -> Callable[..., Any]:
    gates = importlib.import_module("fla.ops.kda.gate")

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor, **options: Any):
        bound = options["lower_bound"]
        gate = gates.naive_kda_gate if bound is None else partial(gates.naive_kda_lowerbound_gate, lower_bound=bound)
        with in_float64(gates):
            decay = gate(g, A_log, dt_bias, output_dtype=torch.float64)
        beta = beta.sigmoid() * (2 if options["allow_neg_eigval"] else 1)
        return definition(unit(q), unit(k), v, decay, beta)

    return call


def _delta_product(definition: Any) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, num_householder: int, **_: Any):
        scale = q.shape[-1] ** -0.5
        return definition(unit(q), unit(k), v, g, beta, scale, num_householder=num_householder)

    return call


def _mesa(definition: Any) -> Callable[..., Any]:
    return lambda q, k, v, g, beta, lamb, **_: definition(unit(q), unit(k), v, g, lamb, beta)


def _attention(definition: Any) -> Callable[..., Any]:
    return lambda *pairs, window_size=None, cu_seqlens=None: definition(*pairs)


def _gla(definition: Any) -> Callable[..., Any]:
    return lambda q, k, v, gk=None, g=None, **_: definition(q, k, v, gk if g is None else g)


def _heads_first(definition: Any) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, **options: Any) -> tuple[Tensor, None]:
        if options.get("use_qk_l2norm_in_kernel"):
            q, k = unit(q), unit(k)
        given = (x.transpose(1, 2) for x in (q, k, v) + (() if beta is None else (beta,)))
        o = definition(*given)
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2), None

    return call


SMALL = {"hidden_size": D, "num_heads": H}
BY_HEAD = SMALL | {"head_dim": K, "expand_v": V / K}
OURS = {"key_dim": K, "value_dim": V}
GDN = ("gated_delta_rule", "naive_recurrent_gated_delta_rule", _gated_delta)
KDA = ("kda", "naive_recurrent_kda", _kda)
PEERS = {
    "kda": Peer(("kda", "KimiDeltaAttention"), SMALL | {"head_dim": D // H}, {}, KDA),
    "kda, lower bound": Peer(
        ("kda", "KimiDeltaAttention"),
        SMALL | {"head_dim": D // H, "safe_gate": True, "lower_bound": -5.0},
        {"decay.lower_bound": -5.0},
        KDA,
    ),
    "gated_delta": Peer(("gated_deltanet", "GatedDeltaNet"), BY_HEAD, OURS, GDN),
    "gated_delta, 2 value heads a key head, steps up to 2": Peer(
        ("gated_deltanet", "GatedDeltaNet"),
        BY_HEAD | {"num_v_heads": 2 * H, "allow_neg_eigval": True},
        OURS | {"num_heads": 2 * H, "num_key_heads": H, "regressor.negative_eigenvalues": True},
        GDN,
    ),
    "delta_product": Peer(
        ("gated_deltaproduct", "GatedDeltaProduct"),
        BY_HEAD,
        OURS,
        ("gated_delta_product", "naive_recurrent_gated_delta_product", _delta_product),
    ),
    "deltanet": Peer(("delta_net", "DeltaNet"), SMALL, {}, ("delta_rule", "delta_rule_recurrence", _heads_first)),
    "gla": Peer(("gla", "GatedLinearAttention"), SMALL, {}, ("gla", "naive_recurrent_gla", _gla)),
    "retnet": Peer(
        ("multiscale_retention", "MultiScaleRetention"), SMALL, {}, ("retention", "naive_retention", _heads_first)
    ),
    "mesa": Peer(
        ("mesa_net", "MesaNet"), SMALL | {"head_dim": D // H}, {}, ("mesa_net", "naive_mesa_net_exact", _mesa)
    ),
    "parallax": Peer(("parallax", "Parallax"), SMALL, {}, ("parallax", "naive_parallax", _attention)),
    "parallax, grouped heads": Peer(
        ("parallax", "Parallax"),
        SMALL | {"num_heads": 4, "num_kv_heads": 2},
        {"num_heads": 4, "num_kv_heads": 2},
        ("parallax", "naive_parallax", _attention),
    ),
    "forgetting": Peer(
        ("forgetting_attn", "ForgettingAttention"), SMALL, {}, ("forgetting_attn", "naive_forgetting_attn", _attention)
    ),
}


def built(peer: Peer) -> tuple[Layer, Callable[[Any], Weights]]:
    """Theirs, and what gives their weights to ours."""
    (file, name), (op, definition, adapt) = peer.layer, peer.op
    module = importlib.import_module(f"fla.layers.{file}")
    naive = importlib.import_module(f"fla.ops.{op}.naive")
    theirs: Any = varied(getattr(module, name)(**peer.settings))
    weights = {key: value.clone() for key, value in theirs.state_dict().items()}
    theirs = without_kernels(theirs).eval()
    if hasattr(theirs, "_use_fused_qkv_conv"):
        theirs._use_fused_qkv_conv = lambda **_: False
    kernels = {key for key in vars(module) if key.startswith(("chunk_", "fused_recurrent_", "parallel_"))}
    replaced = dict.fromkeys(kernels, adapt(getattr(naive, definition)))

    def call(x: Tensor) -> Tensor:
        with in_float64(module, naive, **replaced):
            return theirs(x)[0]

    return call, partial(from_fla, weights)
