"""LaCT's layer by its formulas, as layer_lact_swiglu.py and ttt_operation.py of a1600012888/LaCT have them: chunk by
chunk, its gradients by autograd, weights in the published shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.published.plain import Layer, drawn, normed, turned
from scripts.published.weights import Weights

D, ATTENTION, H, K, RANK, CHUNK, BASE = 32, 2, 4, 8, 3, 8, 1e6  # K: of the network's heads
STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
OURS = {"regressor.grad_batch": CHUNK, "window": CHUNK, "regressor.rank": RANK}


def lact() -> tuple[Layer, Callable[[Any], Weights]]:
    w = drawn(qkv=(3 * D, D), out=(D, D), scale=(D, 2), offset=(D, 2), left0=(H, K, RANK), right0=(H, RANK, K))
    w |= drawn(left2=(H, K, RANK), right2=(H, RANK, K), down=(H, K, K), rates=(3 * H, D), rates_bias=(3 * H,))
    w |= drawn(momentum=(H, D), momentum_bias=(H,), gate=(H, D), gate_bias=(H,), norm=(K,))
    turn = turned(BASE)

    def heads(x: Tensor, number: int) -> Tensor:
        return x.unflatten(-1, (number, -1))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = turn(heads(q, ATTENTION), heads(k, ATTENTION))
        age = torch.arange(q.shape[1]).view(-1, 1) - torch.arange(q.shape[1])
        seen = (age >= 0) & (age < CHUNK)
        q, k, v = (x.transpose(1, 2) for x in (q, k, heads(v, ATTENTION)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(-2)

    def fast(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        both = (F.silu(x * w["scale"][:, i] + w["offset"][:, i]) for i, x in enumerate((q, k)))
        both = (heads(x, H) / (heads(x, H).norm(dim=-1, keepdim=True) + 1e-5) for x in both)
        q, k = turn(*(heads(x.flatten(-2), ATTENTION) for x in both))
        return heads(q.flatten(-2), H), heads(k.flatten(-2), H)

    def network(weights: list[Tensor], x: Tensor) -> Tensor:
        """[B, T, H, K], W [B, H, out, in]."""
        gate, down, up = (partial(torch.einsum, "bhoi,bthi->btho", m) for m in weights)
        return down(F.silu(gate(x)) * up(x))

    def call(x: Tensor) -> Tensor:
        q, k, v = F.linear(x, w["qkv"]).chunk(3, dim=-1)
        (fast_q, fast_k), fast_v = fast(q, k), heads(F.silu(v), H)
        rates = heads(F.softplus(F.linear(x, w["rates"], w["rates_bias"])), H)
        momentum = F.linear(x, w["momentum"], w["momentum_bias"]).sigmoid()
        half = torch.eye(K, dtype=x.dtype) / 2
        first = [w["left0"] @ w["right0"] + half, w["down"], w["left2"] @ w["right2"] + half]
        weights = [m.expand(len(x), H, K, K).requires_grad_() for m in first]
        lengths, kept, reads = [m.norm(dim=-1, keepdim=True) for m in weights], [torch.zeros_like(weights[0])] * 3, []
        for start in range(0, x.shape[1], CHUNK):
            here = slice(start, start + CHUNK)
            reads.append(network(weights, fast_q[:, here]))
            agreement = (network(weights, fast_k[:, here]) * fast_v[:, here]).sum(-1)  # [B, C, H]
            mean = momentum[:, here].mean(1)[..., None, None]
            for i in range(3):
                total = (agreement * rates[:, here, :, i]).sum()
                kept[i] = torch.autograd.grad(total, weights[i], create_graph=True)[0] + mean * kept[i]
            weights = [m + _orthogonal(b) for m, b in zip(weights, kept, strict=True)]
            weights = [m / (m.norm(dim=-1, keepdim=True) + 1e-5) * n for m, n in zip(weights, lengths, strict=True)]
        read = normed(w["norm"], 1e-5)(torch.cat(reads, dim=1))
        gate = F.silu(F.linear(x, w["gate"], w["gate_bias"])).unsqueeze(-1)
        return F.linear(attention(q, k, v) + (gate * read).flatten(-2), w["out"])

    return call, lambda ours: _weights(w)


def _orthogonal(G: Tensor) -> Tensor:
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in STEPS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def _weights(w: Weights) -> Weights:
    """Ours has W_0, W_2 and W_1 in this order, and matrices that are read from the left."""
    order = torch.tensor([3 * h + i for h in range(H) for i in (0, 2, 1)])
    start = [w[name].mT for name in ("right0", "left0", "right2", "left2", "down")]
    return {f"regressor.start.{i}": m for i, m in enumerate(start)} | {
        "projection.weight": w["qkv"],
        "output.weight": w["out"],
        "scale": w["scale"].T,
        "offset": w["offset"].T,
        "regressor.rates.weight": w["rates"][order],
        "regressor.rates.bias": w["rates_bias"][order],
        "regressor.momentum.weight": w["momentum"],
        "regressor.momentum.bias": w["momentum_bias"],
        "regressor.scale.weight": w["gate"],
        "regressor.scale.bias": w["gate_bias"],
        "regressor.norm.weight": w["norm"],
    }
