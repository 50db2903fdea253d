"""What is timed beside the memories: the loss, the feed-forward layer, and a whole block."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.block import Block, SwiGLU, feed_forward
from models.kernels import cross_entropy, read_out, residual, swiglu
from models.loss import sum_nats
from scripts.benchmarks import peers
from scripts.benchmarks.timing import Case, Operator, same
from scripts.recipes import composed, mixer_of


def cases(device: str) -> dict[str, Callable[[], Case]]:
    """size -> what makes its inputs and operators. On a GPU those of size=340m, 16 sequences of 2,048 tokens."""
    if device == "cpu":
        return {
            "cross-entropy N512 D64 V1000": lambda: loss(512, 64, 1000, device),
            "swiglu B2 T128 D64 F148": lambda: gated(2, 128, 64, 148, device),
        }
    return {
        "cross-entropy N32768 D1024 V32768": lambda: loss(32768, 1024, 32768, device),
        "swiglu B16 T2048 D1024 F2368": lambda: gated(16, 2048, 1024, 2368, device),
        "block B16 T2048 D1024": lambda: block(16, 2048, 1024, 8),
    }


def loss(N: int, D: int, V: int, device: str) -> Case:
    """The sum of all tokens' losses; gradients to hidden in the dtype of the product and to a weight in float32."""
    torch.manual_seed(0)
    hidden, y = torch.randn(N, D, device=device), torch.randint(V, (N,), device=device)
    weight = (torch.randn(V, D, device=device) * D**-0.5).requires_grad_()
    hidden = hidden.to(torch.bfloat16 if device == "cuda" else torch.float32).requires_grad_()

    def with_targets(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def operator(hidden: Tensor, weight: Tensor) -> Tensor:
            return function(hidden, weight.to(hidden.dtype), y)

        return operator

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        with half(device):
            return sum_nats(hidden, weight, y)

    def by_chunks(mebibytes: int) -> Callable[..., Tensor]:
        def operator(hidden: Tensor, weight: Tensor) -> Tensor:
            with patch.object(cross_entropy, "CHUNK", mebibytes * 2**20):
                return ours(hidden, weight)

        return operator

    named: dict[str, Callable[..., Tensor]] = {"torch, all logits": with_targets(all_logits)}
    if device == "cuda":
        named |= {"ours, PyTorch": refused(cross_entropy, ours), "ours, Triton": ours}
        named |= {f"ours, Triton, {size} MiB": by_chunks(size) for size in (128, 1024, 2048)}
        named["fla, fused"] = with_targets(peers.fla_cross_entropy)
    else:
        named["ours, PyTorch"] = ours
    if hasattr(F, "linear_cross_entropy"):
        named["torch, linear_cross_entropy"] = with_targets(peers.torch_cross_entropy)
    if importlib.util.find_spec("liger_kernel") is not None and device == "cuda":
        named["Liger, fused"] = with_targets(peers.liger_cross_entropy)
    return same([hidden, weight], named)


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def gated(B: int, T: int, D: int, inner_size: int, device: str) -> Case:
    """The layer with the gradients of its weights, and on a GPU compiled as train.py compiles it."""
    torch.manual_seed(0)
    x = torch.randn(B, T, D, device=device).requires_grad_()
    operators = {"ours, PyTorch": timed(SwiGLU(D, inner_size), x, device, swiglu)}
    if device == "cuda":
        operators["ours, PyTorch, compiled"] = timed(SwiGLU(D, inner_size), x, device, swiglu, compiled=True)
        operators["ours, Triton"] = timed(SwiGLU(D, inner_size), x, device)
        operators["ours, Triton, compiled"] = timed(SwiGLU(D, inner_size), x, device, compiled=True)
        operators["fla, GatedMLP"] = timed(peers.gated_mlp(D, inner_size), x, device)
    return Case(operators, alike=False)


def block(B: int, T: int, D: int, num_heads: int) -> Case:
    """A block of gated_delta and of softmax, compiled; `--kernels` says what its norms and residuals take. By PyTorch
    these, SwiGLU and the read-out are torch.compile's."""
    torch.manual_seed(0)
    x, operators = torch.randn(B, T, D, device="cuda").requires_grad_(), {}
    for preset in ("gated_delta", "softmax"):
        for form, refusing in (("PyTorch", (swiglu, residual, read_out)), ("Triton", ())):
            mixer = mixer_of(composed(preset, f"model.num_heads={num_heads}", f"model.hidden_size={D}"))
            layer = Block(D, mixer, feed_forward("swiglu", D, mixer), 1e-6)
            operators[f"{preset}, by {form}"] = timed(layer, x, "cuda", *refusing, compiled=True)
    return Case(operators, alike=False)


def timed(layer: nn.Module, x: Tensor, device: str, *without: ModuleType, compiled: bool = False) -> Operator:
    """By bf16 products on a GPU, without the state that a block returns. without: kernels that are not taken."""
    layer = layer.to(device)
    if compiled:
        layer.compile(dynamic=False)

    def operator(x: Tensor) -> Tensor:
        with half(device):
            y = layer(x)
        return y[0] + y[1] if isinstance(y, tuple) else y  # a block's residual stream, whole

    for kernels in without:
        operator = refused(kernels, operator)
    return Operator(operator, [x], tuple(layer.parameters()))


def refused(kernels: ModuleType, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function where these kernels say that they can't run."""

    def operator(*inputs: Tensor) -> Any:
        with patch.object(kernels, "refusal", _not_asked_for):
            return function(*inputs)

    return operator


def _not_asked_for(*_: Any) -> str:
    return "the definition is timed"


def half(device: str) -> torch.autocast:
    """bf16 products on a GPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
