"""A block's step in few launches: where its mixer is one that models/kernels/step knows, its projections are one
product, and what stands between the products are those kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.block import Both, SwiGLU, add_and_norm
from models.kernels import step as kernels
from models.mixers.layer import State
from models.mixers.mixer import ACTIVATIONS, GATES, Mixer
from models.parts.decay import NoDecay, ScalarDecay
from models.parts.features import Identity
from models.parts.linear import is_its_weight
from models.regression.linear.delta import STEPS, Delta
from models.regression.linear.momentum import Momentum
from models.regression.linear.references import State as Matrices


def refusal(mixer: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not compute this mixer's step, or None where they do."""
    if type(mixer) is not Mixer:
        return f"{type(mixer).__name__} is more than a mixer of one memory"
    memory = mixer.regressor
    if type(memory) not in (Delta, Momentum) or type(mixer.decay) not in (ScalarDecay, NoDecay):
        return f"the kernels know no {type(memory).__name__} with {type(mixer.decay).__name__}"
    if isinstance(memory, Delta) and (memory.share is not STEPS["gradient"] or memory.gradient_before_decay):
        return f"the kernels know no step as {memory.fit}"
    if isinstance(memory, Momentum) and memory.grad_batch > 1:
        return "the kernels know no mini-batches"
    others = mixer.shift, mixer.rotary, mixer.feature_norm
    if mixer.convolution is None or mixer.conv_on != "qkv" or any(x is not None for x in others):
        return "the kernels know keys by a short convolution, an activation and a norm of length one alone"
    if not all(is_its_weight(layer) for layer in mixer.layers_of_input()):
        return "a projection is more than its weight"
    if mixer.output is None or isinstance(mixer.q_norm, nn.Module) or not isinstance(mixer.features, Identity):
        return "the kernels know no features, no learned norm of keys, and no mixer without a projection of its own"
    return kernels.refusal(device, dtype, mixer.key_dim, mixer.value_dim)


class FusedMixer:
    """(x [B, 1, D], state) -> (y, state), the state's tensors written in place.

    weight: all that is a product with x, in the compute dtype, one below the other; zeros fill it up to rows by eights,
    which the matrix units want. `refresh` copies the mixer's own into it.
    """

    def __init__(self, mixer: Any, dtype: torch.dtype) -> None:
        self.mixer, memory = mixer, mixer.regressor
        self.sources = [layer.weight for layer in mixer.layers_of_input()]
        rows = sum(len(w) for w in self.sources)
        self.weight = self.sources[0].new_zeros(rows + -rows % 8, self.sources[0].shape[1], dtype=dtype)
        self.refresh()
        eps = mixer.q_norm.keywords["eps"] if mixer.q_norm is not None else 0.0
        norm = mixer.output_norm
        self.rule = kernels.Rule(
            mixer.activation is ACTIVATIONS["silu"],
            mixer.q_norm is not None,
            eps,
            getattr(memory, "largest_step", 1.0 / getattr(memory, "grad_batch", 1)),
            getattr(memory, "tied", False),
            0.0 if norm is None else norm.eps,
            next(name for name, gate in GATES.items() if gate is mixer.gate),
        )

    def refresh(self) -> None:
        parts = self.weight[: sum(len(w) for w in self.sources)].split([len(w) for w in self.sources])
        for part, source in zip(parts, self.sources, strict=True):
            part.copy_(source)

    def __call__(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        mixer, memory = self.mixer, state.memory
        parameters = kernels.Parameters(
            mixer.convolution.weight,
            getattr(mixer.decay, "log_rate", None),
            getattr(mixer.decay, "bias", None),
            mixer.regressor.step_size.bias,
            mixer.regressor.momentum.bias if isinstance(memory, Matrices) else None,
            None if mixer.output_norm is None else mixer.output_norm.weight,
        )
        M, S = memory[:2] if isinstance(memory, Matrices) else (memory, None)
        assert state.tails[0] is not None
        states = kernels.States(M, S, state.tails[0], state.position)
        pairs = kernels.product(x[:, 0].to(self.weight.dtype), self.weight)
        return projected(mixer.output, kernels.mix(pairs, states, parameters, self.rule)).unsqueeze(1), state


def projected(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), x [B, D], by a kernel where the layer is a product with a weight that x has the dtype of."""
    if is_its_weight(layer) and isinstance(layer, nn.Linear) and layer.bias is None and layer.weight.dtype == x.dtype:
        return kernels.product(x, layer.weight)
    return layer(x)


class FusedBlock:
    """models/block.py's Block for one token of a state. refusal: why its mixer is the layers', None where it is not."""

    def __init__(self, block: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.block, self.dtype = block, dtype
        self.refusal = refusal(block.mixer, device, dtype)
        self.mixer: Any = block.mixer if self.refusal else FusedMixer(block.mixer, dtype)
        self.swiglu = self.refusal is None and type(block.feed_forward) is SwiGLU

    def __call__(self, x: Tensor, y: Tensor | None, state: State | Both) -> tuple[Tensor, Tensor, State | Both]:
        """(x, y, state) -> (x, y, state), x [B, 1, D] the residual stream and y what is still to be added to it."""
        block, layer = self.block, self.block.feed_forward
        x, h = add_and_norm(x, y, block.mixer_norm)
        y, mixed = self.mixer(h, state.mixer if isinstance(state, Both) else state)
        x, h = add_and_norm(x, y, block.feed_forward_norm)
        if isinstance(state, Both):
            y, memory = layer(h, state.feed_forward)
            return x, y, Both(mixed, memory)
        state = mixed
        if not self.swiglu:
            return x, layer(h), state
        return x, projected(layer.output, kernels.swiglu(projected(layer.up, h[:, 0]))).unsqueeze(1), state
