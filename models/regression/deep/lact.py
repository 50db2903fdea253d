"""LaCT: a network that learns from large chunks, and attention to what is in them (Zhang et al. 2025).

Problem.    Fit f(x) = (s(x W_0) * x W_2) W_1, s = SiLU, to the pairs of the past by the loss -f(k) . v, in few large
            steps: small ones leave a GPU idle, and a large fast weight needs large products.
Solution.   Apply, then update. All tokens of a chunk of b read the weights that the chunks before it have made,
                m_t = f(q_t) ,
            and with learning rates eta of their own for each matrix, and the chunk's mean momentum mu, it then makes
                B <- mu B - sum_i eta_i d(-f(k_i) . v_i)/dW ,    W <- (W + orthogonal(B)) |W_0| / |W + orthogonal(B)| ,
            by Muon's five Newton-Schulz steps, the columns of W held to the lengths that they have at the start, which
            is learned for each head. Since Muon undoes the scale of B, the rates only weigh the tokens of a chunk
            against each other. What a chunk has not told the weights yet, softmax attention in a sliding window of the
            last w tokens knows, from the same queries, keys and values:
                o_t = g_t norm(m_t) + attention_t ,    g = silu(x W_g) .
State.      The weights, the gradients of a chunk so far, B, and the window's pairs.
Exactness.  Every form is the same up to rounding: within a chunk tokens only add up.
Here.       The shell makes q, k and v, and attention gets those that the network gets: after SiLU, of length one, and
            turned by their positions. In the published layer attention has them before SiLU, behind an RMS norm, and
            the network after a learned scale and offset for every channel; attention has more heads than the network,
            as many here; starts of W_0 and W_2 may be of low rank, plus I / 2, and have full rank here. Newton-Schulz
            steps are Jordan's (the published code has other coefficients). Documents and decoding are new: the
            published code ignores cu_seqlens, and has no state of the network to go on from.

Shapes: B batch, T tokens, H heads, K and V widths of keys and values, C tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.norm import RMSNorm
from models.parts.precision import NORM_EPS, wide
from models.parts.sizes import Sizes
from models.regression.deep import forms
from models.regression.deep.memory import NetworkMemory, Parameters
from models.regression.deep.network import SwiGLU
from models.regression.deep.optimizers import INNER_OPTIMIZERS
from models.regression.deep.rules import AtEnd, Gates, Start
from models.regression.local.constant import Softmax
from models.regression.local.pairs import Pairs
from models.regression.regressor import Regressor, Tokens

BASE_RATE = 1e-3  # of the learning rates, at the start


class State(NamedTuple):
    """memory: of the network. pairs: of the window."""

    memory: forms.State
    pairs: Pairs


class LaCT(NetworkMemory):
    """The layer above.

    grad_batch: b, a part of the model.  window: w, of attention.  expansion: the network's inner width over K.
    chunk: tokens at once, a choice of memory only; None for a whole mini-batch.  remat: of NetworkMemory.
    """

    accepts_decay = ("none",)
    recall = Regressor.recall  # none: what it reads is half attention's
    function_class, fit = "SwiGLU, constant around q", "muon step for a chunk"

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        grad_batch: int = 2048,
        window: int = 2048,
        expansion: float = 1.0,
        remat: int = 1,
    ) -> None:
        super().__init__(sizes, backend, chunk, grad_batch, remat)
        D, H, _, K, V = sizes
        if (inner := round(expansion * K)) < 1:
            raise ValueError(f"regressor.expansion={expansion} leaves an inner width of {inner}; it must be positive")
        self.attention = Softmax(sizes, backend, window=window)
        self.rule = AtEnd(SwiGLU(), INNER_OPTIMIZERS["muon"], normed=True)
        self.start = Parameters(torch.randn(H, n, m) / math.sqrt(n) for n, m in ((K, inner), (K, inner), (inner, V)))
        self.rates, self.momentum, self.scale = nn.Linear(D, 3 * H), nn.Linear(D, H), nn.Linear(D, H)
        nn.init.constant_(self.rates.bias, math.log(math.expm1(BASE_RATE)))  # the inverse of softplus
        self.norm = RMSNorm(V, NORM_EPS)

    def tokens_at_once(self, v: Tensor) -> int:
        return self.chunk or self.grad_batch

    def begin(self) -> Start:
        return Start(self.start(), True)

    def gates(self, x: Tensor, log_decay: Tensor | None = None) -> Gates:
        rates = F.softplus(wide(self.rates(x))).unflatten(-1, (-1, 3))
        momentum = wide(self.momentum(x)).sigmoid()
        sums = torch.stack([torch.zeros_like(momentum), torch.ones_like(momentum), momentum], dim=-1) / self.grad_batch
        return Gates(rates, sums=sums)

    def forward(self, tokens: Tokens, state: State | None = None) -> tuple[Tensor, State]:
        memory, pairs = (None, None) if state is None else state
        read, memory = super().forward(tokens, memory)
        local, pairs = self.attention(tokens, pairs)
        o = F.silu(wide(self.scale(tokens.x))).unsqueeze(-1) * wide(self.norm(read)) + local
        return o.to(tokens.v.dtype), State(memory, pairs)

    def forget(self, state: State, rows: Tensor) -> State:
        return State(super().forget(state.memory, rows), self.attention.forget(state.pairs, rows))

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        return {}

    def flops_per_token(self, seq_len: int) -> int:
        """Three products with every weight: keys through two and, since the loss needs no prediction, errors back
        through the third; a write and a read of each. The projections of rates, momenta and scales, Muon's products at
        the end of each chunk, and attention.
        """
        weights = sum(w.numel() for w in self.start)
        gates = 10 * self.num_heads * self.hidden_size
        return 6 * weights + gates + self.step_flops(seq_len) + self.attention.flops_per_token(seq_len)

    def state_size(self, seq_len: int) -> int:
        return super().state_size(seq_len) + self.attention.state_size(seq_len)
