"""Layers whose published code does not run here, written from their formulas, one token at a time, beside ours: inner
gradients by autograd, weights in the published shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.published import lact
from scripts.published.plain import Layer, convolved, drawn, unit
from scripts.published.weights import Weights

D, H, K, BATCH = 32, 2, 16, 16  # model width, heads, head width, tokens of TTT's mini-batches


def by_head(x: Tensor) -> Tensor:
    """[B, T, H K] -> [B, H, T, K]."""
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def ttt(hidden: bool) -> tuple[Layer, Callable[[Any], Weights]]:
    """TTT-Linear, or TTT-MLP: ttt.py of test-time-training/ttt-lm-pytorch with share_qk and use_gate. Positions turn
    neighbouring channels of a head together; ours those of two halves, so that channels change places."""
    widths = (K, 4 * K, K) if hidden else (K, K)
    inner = {f"W{i}": (H, a, b) for i, (a, b) in enumerate(pairwise(widths))}
    inner |= {f"b{i}": (H, 1, b) for i, b in enumerate(widths[1:])}
    outer = {
        "q": (D, D),
        "v": (D, D),
        "conv_q": (D, 1, 4),
        "conv_k": (D, 1, 4),
        "conv_q_bias": (D,),
        "conv_k_bias": (D,),
    }
    outer |= {"lr": (H, D), "lr_bias": (H,), "token": (BATCH,), "norm": (H, 1, K), "norm_bias": (H, 1, K)}
    w = drawn(**inner, **outer, post=(D,), post_bias=(D,), gate=(D, D), out=(D, D))
    w["token"] /= 10
    base_lr, names = (0.1 if hidden else 1.0), list(inner)

    def network(z: Tensor, weights: list[Tensor]) -> Tensor:
        layers = len(weights) // 2
        for i in range(layers):
            z = z @ weights[i] + weights[layers + i]
            z = F.gelu(z, approximate="tanh") if i < layers - 1 else z
        return F.layer_norm(z, (K,), eps=1e-6) * w["norm"] + w["norm_bias"]

    def turn(x: Tensor) -> Tensor:
        angle = (torch.arange(x.shape[2]) % BATCH).view(-1, 1) * 10_000.0 ** -(torch.arange(K // 2).double() / (K // 2))
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1).flatten(-2)

    def call(x: Tensor) -> Tensor:
        shared = F.linear(x, w["q"])
        q, k = (convolved(w[f"conv_{n}"], w[f"conv_{n}_bias"], None)(shared)[0] for n in "qk")
        q, k, v = turn(by_head(q)), turn(by_head(k)), by_head(F.linear(x, w["v"]))
        rate = (x @ w["lr"].T + w["lr_bias"]).sigmoid().mT * base_lr / K  # [B, H, T]
        share = (1 / torch.arange(1, BATCH + 1, dtype=x.dtype) + w["token"]).clamp(min=0)
        weights = [w[name].expand(len(x), *w[name].shape).requires_grad_() for name in names]
        outputs = []
        for t in range(x.shape[1]):
            here = slice(t, t + 1)
            if t % BATCH == 0:
                first, total = weights, [torch.zeros_like(m) for m in weights]
            error = network(k[:, :, here], first) - (v - k)[:, :, here]
            gradients = torch.autograd.grad(error.square().sum() / 2, first, create_graph=True)
            total = [m + rate[:, :, t, None, None] * g for m, g in zip(total, gradients, strict=True)]
            weights = [m - share[t % BATCH] * g for m, g in zip(first, total, strict=True)]
            outputs.append(q[:, :, here] + network(q[:, :, here], weights))
        o = torch.cat(outputs, dim=2).transpose(1, 2).flatten(-2)
        o = F.layer_norm(o, (D,), w["post"], w["post_bias"], 1e-6)
        return F.linear(o * F.gelu(F.linear(x, w["gate"]), approximate="tanh"), w["out"])

    return call, partial(_ttt_weights, w, len(widths) - 1)


def _ttt_weights(w: Weights, layers: int, ours: Any) -> Weights:
    halves = torch.cat([torch.arange(0, K, 2), torch.arange(1, K, 2)])
    rows = torch.cat([h * K + halves for h in range(H)])
    start = {f"W{i}": w[f"W{i}"] for i in range(layers)} | {f"b{i}": w[f"b{i}"] for i in range(layers)}
    start["W0"], last = start["W0"][:, halves], layers - 1
    start[f"W{last}"], start[f"b{last}"] = start[f"W{last}"][..., halves], start[f"b{last}"][..., halves]
    found = {f"regressor.start.{2 * i}": start[f"W{i}"] for i in range(layers)}
    found |= {f"regressor.start.{2 * i + 1}": start[f"b{i}"] for i in range(layers)}
    return found | {
        "projection.weight": torch.cat([w["q"][rows], w["v"][rows]]),
        "convolution.weight": torch.cat([w["conv_q"][rows], w["conv_k"][rows]]).squeeze(1),
        "conv_bias": torch.cat([w["conv_q_bias"][rows], w["conv_k_bias"][rows]]),
        "regressor.norm_weight": w["norm"][:, 0, halves],
        "regressor.norm_bias": w["norm_bias"][:, 0, halves],
        "regressor.token_offset": w["token"],
        "regressor.step_size.weight": w["lr"],
        "regressor.step_size.bias": w["lr_bias"],
        "read_norm.weight": w["post"][rows],
        "read_norm.bias": w["post_bias"][rows],
        "gate_projection.weight": w["gate"][rows],
        "output.weight": w["out"][:, rows],
    }


def memory_mosaic() -> tuple[Layer, Callable[[Any], Weights]]:
    """ContextMem of facebookresearch/MemoryMosaics (nanoMosaics/mosaic_model.py), without biases."""
    w = drawn(k=(D, D), v=(D, D), out=(D, D))
    w |= {"leaky": torch.tensor([0.05, 0.5]), "key_scale": torch.tensor([0.1, 0.07]), "peek": torch.tensor([0.3, 0.8])}
    w["value_scale"] = torch.tensor([-0.05, 0.02])
    w = {name: weight.double() for name, weight in w.items()}

    def call(x: Tensor) -> Tensor:
        a, v = by_head(F.linear(x, w["k"])), by_head(F.linear(x, w["v"]))
        fade, peek = (-10 * w["leaky"].abs()).exp().view(H, 1), w["peek"].view(H, 1, 1)
        averages, average = [], torch.zeros_like(a[:, :, 0])
        for t in range(x.shape[1]):
            average = a[:, :, t] + fade * average
            averages.append(average)
        k = torch.stack(averages, dim=2)
        k = k / k.norm(dim=-1, keepdim=True) * (10 * w["key_scale"]).exp().view(H, 1, 1)
        v = (1 - peek) * F.pad(v[:, :, 1:], (0, 0, 0, 1)) + peek * v
        v = v / v.norm(dim=-1, keepdim=True) * (10 * w["value_scale"]).exp().view(H, 1, 1)
        outputs = [torch.zeros_like(v[:, :, 0])]
        for t in range(1, x.shape[1]):
            seen = (k[:, :, :t] @ k[:, :, t, :, None]).softmax(dim=2)
            outputs.append((seen * v[:, :, :t]).sum(2))
        return F.linear(torch.stack(outputs, dim=1).flatten(-2), w["out"])

    def weights(ours: Any) -> Weights:
        return {
            "projection.weight": torch.cat([w["k"], w["v"]]),
            "average.log_rate": (10 * w["leaky"]).log(),
            "peek": w["peek"].logit(),
            "regressor.log_beta": 20 * w["key_scale"],  # of two keys
            "output.weight": w["out"] * (10 * w["value_scale"]).exp().repeat_interleave(K),
        }

    return call, weights


def linear() -> tuple[Layer, Callable[[Any], Weights]]:
    """Linear attention (Katharopoulos et al. 2020, equations 7 and 9)."""
    w = drawn(qkv=(3 * D, D), out=(D, D))

    def call(x: Tensor) -> Tensor:
        q, k, v = (by_head(y) for y in F.linear(x, w["qkv"]).split(D, dim=-1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        shares = (q @ k.mT).tril()
        return F.linear((shares @ v / shares.sum(-1, keepdim=True)).transpose(1, 2).flatten(-2), w["out"])

    return call, lambda ours: {"projection.weight": w["qkv"], "output.weight": w["out"]}


def titans(deep: bool = False) -> tuple[Layer, Callable[[Any], Weights]]:
    """Titans with a linear memory, each gradient where the memory stands, or a deep one, by mini-batches (Behrouz et
    al. 2025, equations 13 to 16), its steps held below 1 - eta: the paper says of its gates only that they come from
    the data."""
    w = drawn(qkv=(3 * D, D), gate=(D, D), conv=(3 * D, 1, 4), out=(D, D), norm=(K,), a=(H, D), a_bias=(H,), rate=(H,))
    w |= drawn(eta=(H, D), eta_bias=(H,), theta=(H, D), theta_bias=(H,), W1=(H, K, 4 * K), W2=(H, 4 * K, K))
    first = [w["W1"] * 4, w["W2"] / 4] if deep else [torch.zeros(H, K, K, dtype=torch.float64)]
    batch, eps = (BATCH, 1e-6) if deep else (1, 1e-5 * K)

    def network(x: Tensor, weights: list[Tensor]) -> Tensor:
        """x [B, H, 1, K]."""
        return F.silu(x @ weights[0]) @ weights[1] if deep else x @ weights[0]

    def call(x: Tensor) -> Tensor:
        q, k, v = (by_head(y) for y in convolved(w["conv"], None, "silu")(F.linear(x, w["qkv"]))[0].split(D, dim=-1))
        q, k = unit(q), unit(k)
        eta, theta = ((x @ w[name].T + w[f"{name}_bias"]).sigmoid() for name in ("eta", "theta"))
        alpha = 1 - (-w["rate"].exp() * F.softplus(x @ w["a"].T + w["a_bias"])).exp()
        eta, theta, alpha = (y[..., None, None] for y in (eta, (1 - eta) * theta / batch, alpha))
        M = [m.expand(len(x), *m.shape).requires_grad_() for m in first]
        S, before, outputs = [torch.zeros_like(m) for m in M], M, []
        for t in range(x.shape[1]):
            before, here = M if t % batch == 0 else before, slice(t, t + 1)
            loss = (v[:, :, here] - network(k[:, :, here], before)).square().sum() / 2
            surprise = torch.autograd.grad(loss, before, create_graph=True)
            S = [eta[:, t] * s - theta[:, t] * g for s, g in zip(S, surprise, strict=True)]
            M = [(1 - alpha[:, t]) * m + s for m, s in zip(M, S, strict=True)]
            outputs.append(network(q[:, :, here], M).squeeze(2))
        o = torch.stack(outputs, dim=1)
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * w["norm"]
        return F.linear(o.flatten(-2) * F.silu(F.linear(x, w["gate"])), w["out"])

    def weights(ours: Any) -> Weights:
        start = {"regressor.start.0": first[0], "regressor.start.1": first[1] * batch} if deep else {}
        return start | {
            "projection.weight": torch.cat([w["qkv"], w["gate"]]),
            "convolution.weight": w["conv"].squeeze(1),
            "decay.projection.weight": w["a"],
            "decay.bias": w["a_bias"],
            "decay.log_rate": w["rate"],
            "regressor.momentum.weight": w["eta"],
            "regressor.momentum.bias": w["eta_bias"],
            "regressor.step_size.weight": w["theta"],
            "regressor.step_size.bias": w["theta_bias"],
            "output_norm.weight": w["norm"],
            "output.weight": w["out"],
        }

    return call, weights


def in_place() -> tuple[Layer, Callable[[Any], Weights]]:
    """Qwen3MLP of ByteDance-Seed/In-Place-TTT (hf_models/hf_qwen3/modeling_qwen3.py), its targets the layer's input."""
    wide = 3 * K
    w = drawn(gate=(wide, D), up=(wide, D), down=(D, wide), target=(D, D), conv=(D, 1, 5))

    def call(x: Tensor) -> Tensor:
        h = F.silu(F.linear(x, w["gate"])) * F.linear(x, w["up"])
        down, outputs = w["down"].expand(len(x), -1, -1), []
        for z, t in zip(h.split(BATCH, dim=1), x.split(BATCH, dim=1), strict=True):
            outputs.append(z @ down.mT)
            near = F.conv1d(t.mT, w["conv"], padding=2, groups=D)
            down = down + 0.3 * (near.mT @ w["target"]).mT @ z
        return torch.cat(outputs, dim=1)

    def weights(ours: Any) -> Weights:
        return {
            "taps": w["conv"].squeeze(1),
            "up.weight": torch.cat([w["gate"], w["up"]]),
            "output.weight": w["down"],
            "target.weight": w["target"].T,
        }

    return call, weights


class Peer(NamedTuple):
    """built: theirs, and what gives its weights to ours. name: where the formulas are from. ours: overrides."""

    built: Callable[[], tuple[Layer, Callable[[Any], Weights]]]
    name: str
    ours: dict[str, Any]


PEERS = {
    "ttt_linear": Peer(partial(ttt, False), "TTTLinear of ttt-lm-pytorch", {}),
    "ttt_mlp": Peer(partial(ttt, True), "TTTMLP of ttt-lm-pytorch", {}),
    "lact": Peer(lact.lact, "LaCTSWIGLULayer of LaCT", lact.OURS),
    "memory_mosaic": Peer(memory_mosaic, "ContextMem of MemoryMosaics", {}),
    "in_place": Peer(in_place, "Qwen3MLP of In-Place-TTT", {"grad_batch": BATCH, "step_size": 0.3}),
    "linear": Peer(linear, "the paper's equations 7 and 9", {}),
    "titans": Peer(titans, "the paper's equations 13 to 15", {}),
    "titans_mlp": Peer(partial(titans, True), "the paper's equations 13 to 16", {"regressor.grad_batch": BATCH}),
}
