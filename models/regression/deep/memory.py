"""What all deep memories share: a rule, the start of a document, and the forms that compute the same map."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.kernels import deep, ttt
from models.kernels.backend import compiles, unlike
from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.deep.accelerated import kernel_averaged, kernel_online
from models.regression.deep.forms import Call, State, deep_memory
from models.regression.deep.retention import Entropic, Normed
from models.regression.deep.rules import AtEnd, Averaged, Gates, Online, Rule, Start, each, where
from models.regression.memory import Memory
from models.regression.regressor import Tokens

KERNELS: dict[type[Rule], Any] = {Online: (deep, kernel_online), Averaged: (ttt, kernel_averaged)}


class Parameters(nn.ParameterList):
    """A list that is called for its tensors: accelerate's hooks then bring those that it keeps elsewhere."""

    __call__ = nn.Module.__call__  # a ParameterList refuses

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(self)


class NetworkMemory(Memory):
    """A subclass sets the rule. It says what a document begins with, and how gates come from x.

    grad_batch: b, the tokens of a mini-batch, a part of the model.
    remat: chunks computed again together in the backward pass (slots.scan), a choice of memory and speed; 0 or None:
        none.
    """

    rule: Rule
    window: int = 1  # c
    weighs_values: ClassVar[bool] = False

    def __init__(self, sizes: Sizes, backend: str, chunk: int | None, grad_batch: int, remat: int | None) -> None:
        super().__init__(sizes, backend, chunk)
        if grad_batch < 1:
            raise ValueError(f"regressor.grad_batch={grad_batch} is no number of tokens; a positive integer")
        if (remat or 0) < 0:
            raise ValueError(f"regressor.remat={remat} is no number of chunks; a positive integer, or 0 for never")
        self.grad_batch, self.remat = grad_batch, remat or 0

    def begin(self) -> Start:
        """M_0."""
        raise NotImplementedError

    def gates(self, x: Tensor, log_decay: Tensor | None = None) -> Gates:
        """For x [B, T, D] and the recipe's decay [B, T, H]."""
        raise NotImplementedError

    def matrices(self) -> Iterator[tuple[int, int]]:
        """The widths of every layer, without its bias."""
        bias = self.rule.network.bias
        return ((w.shape[1] - bias, w.shape[2]) for w in self.begin().weights)

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        T, backend = k.shape[1], self.choose(v.device, v.dtype).backend
        if isinstance(self.rule, AtEnd) and state is None and 1 < T <= self.grad_batch and torch.is_grad_enabled():
            warnings.warn(
                f"regressor.grad_batch={self.grad_batch}: a memory that steps at the end of a mini-batch learns "
                f"nothing from a sequence of {T} tokens, and what sets its steps gets no gradient",
                stacklevel=2,
            )
        call = Call(self.begin(), q, k, v, self.gates(x, log_decay), state, self.grad_batch, segments)
        if backend == "recurrent" or T == 1:  # one token is the definition
            return deep_memory(self.rule, call)
        if backend == "triton":
            return KERNELS[type(self.rule)][1](self.rule, call)
        return deep_memory(self.rule, call, self.tokens_at_once(v), self.remat, compiles(v.device))

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        """theta, on average over layers, and eta."""
        theta, log_eta, *_ = self.gates(tokens.x, tokens.log_decay)
        found = {"step_size": theta.mean(-1) if theta.ndim == 4 else theta}
        return found if log_eta is None else found | {"momentum": log_eta.exp()}

    def recall(self, x: Tensor, q: Tensor, state: State | None) -> Tensor:
        dtype, start = working_dtype(q), self.begin()
        weights, sums, references, *_ = self.rule.begin(start, len(q), dtype) if state is None else state.fitted
        if state is not None and isinstance(self.rule, Entropic):  # of a mini-batch that is over the next one reads all
            references = where((state.phase == 0).view(-1, 1, 1, 1), weights, references)
        weights = self.rule.held(weights, references, tuple(w.to(dtype) for w in start.weights))
        if state is not None and (share := self.gates(x).share) is not None:  # what its last token read
            c = share[state.phase - 1].view(-1, 1, 1, 1)
            weights = tuple(w + c * s for w, s in zip(weights, sums, strict=True))
        with torch.autocast(q.device.type, enabled=False):
            products = [partial(torch.matmul, other=w.to(dtype)) for w in weights]
            o = self.rule.network.read(products, q.transpose(1, 2).to(dtype), [w.to(dtype) for w in start.norm])
        return o.transpose(1, 2).to(q.dtype)

    def recall_flops_per_token(self) -> int:
        return 2 * sum(w.numel() for w in self.begin().weights)

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        if isinstance(self.rule, Normed | Entropic) or self.rule.network.loss == "switch" or self.window > 1:
            return {}  # Miras and Atlas have none, of whatever size
        if type(self.rule) not in KERNELS:
            return {"triton": "the kernels take regressor.inner_optimizer=momentum, sgd or average"}
        kernels, start, (first, *others) = KERNELS[type(self.rule)][0], self.begin(), self.matrices()
        recipe = {"depth": len(start.weights), "layer_norm": bool(start.norm), "inner_loss": self.rule.network.loss}
        recipe |= vars(self.rule.network)
        widths = (*first, *(out for _, out in others))
        return {"triton": unlike(recipe, kernels.TAKES) or kernels.refusal(device, dtype, self.grad_batch, widths)}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return "a compiled step" if backend == "torch" and compiles(device) else ""

    def forget(self, state: Any, rows: Tensor) -> Any:
        """The memories of the given rows back at the start, and their mini-batches ended."""
        fitted = self.rule.begin(self.begin(), len(rows), state.fitted.weights[0].dtype)
        first = State(fitted, 0 * state.phase, tuple(torch.zeros_like(x) for x in state.pairs))
        return each(lambda new, now: torch.where(rows.view(-1, *[1] * (now.ndim - 1)), new, now), first, state)

    def flops_per_token(self, seq_len: int) -> int:
        """With every weight three products (predict, write, read), with all but the first layer's one more (errors
        back), but for the read of every pair of a window; the projections of the gates; and the optimiser's products at
        the end of each mini-batch.
        """
        weights = sum(w[0].numel() for w in self.begin().weights)
        back = sum(n * m for n, m in list(self.matrices())[1:])
        pairs = self.window * (2 * (1 + self.rule.copies) * weights + 2 * back)
        return self.num_heads * (pairs + 2 * weights) + self.gate_flops() + self.step_flops(seq_len)

    def gate_flops(self) -> int:
        """Of the projections of the gates, for a token."""
        raise NotImplementedError

    def step_flops(self, seq_len: int) -> int:
        """Of the optimiser, for a token."""
        if not isinstance(self.rule, AtEnd):
            return 0
        step = sum(self.rule.optimizer.flops(n, m) for n, m in self.matrices())
        return self.num_heads * step * (seq_len // self.grad_batch) // seq_len

    def state_size(self, seq_len: int) -> int:
        found = 0

        def count(x: Tensor) -> Tensor:
            nonlocal found
            found += x.numel()
            return x

        each(count, self.rule.begin(self.begin(), 1, torch.float32))
        return found + (self.window - 1) * self.num_heads * (self.key_dim + self.value_dim)


def shares(offset: Tensor) -> Tensor:
    """c [b] of the rule Averaged: max(1/p + learned, 0)."""
    learned = wide(offset)
    number = torch.arange(1, len(learned) + 1, device=learned.device)  # from a CPU, a GPU would be waited for
    return (1 / number.to(learned) + learned).clamp(min=0.0)
