"""What the shell does between its projection and its memory, timed: our kernels, PyTorch, and the parts of others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.kernels import read_out
from scripts.benchmarks import peers
from scripts.benchmarks.parts import refused
from scripts.benchmarks.timing import Case, Operator
from scripts.recipes import composed, mixer_of

Heads = tuple[Tensor, ...]


def pairs(preset: str, B: int, T: int, H: int, K: int) -> Case:
    """Of a projected row in bf16, with the gradients by the row and the parameters."""
    torch.manual_seed(0)
    sizes = f"model.num_heads={H}", f"model.hidden_size={H * K}"
    mixer = mixer_of(composed(preset, *sizes)).to("cuda")
    width = mixer.projection.out_features
    mixer.add_module("projection", nn.Identity())
    row = torch.randn(B, T, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    positions = torch.arange(T, device="cuda").expand(B, T)
    parts = [mixer.convolution, mixer.q_norm, mixer.k_norm]
    learned = tuple(p for part in parts if isinstance(part, nn.Module) for p in part.parameters())

    def by(backend: str) -> Callable[..., Heads]:
        def operator(row: Tensor) -> Heads:
            mixer.pairs_backend = backend
            return tuple(y for y in mixer._pairs(row, positions, (None, None), None)[:4] if isinstance(y, Tensor))

        return refused(read_out, operator)  # the gate is made with the others, and not where it is read

    operators = {
        "ours, Triton": Operator(by("triton"), [row], learned),
        "ours, torch.compile": Operator(torch.compile(by("torch"), dynamic=False), [row], learned),
        "ours, PyTorch": Operator(by("torch"), [row], learned),
    }
    if mixer.convolution is not None:
        apart = [y.detach().contiguous().requires_grad_() for y in row.split(H * K, dim=-1)]
        layers = peers.short_convolutions(H * K, mixer.convolution.width)
        operators["fla, ShortConvolution, l2norm"] = Operator(layers, apart, tuple(layers.parameters()))
    return Case(operators, alike=False)
