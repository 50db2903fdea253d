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
            turned by their positions. In the published layer (models/mixers/lact.py) attention has them before SiLU,
            and the network after a learned scale and offset for every channel; attention has more heads than the
            network, as many here; starts of W_0 and W_2 may be of low rank, plus I / 2, and have full rank here;
            Newton-Schulz steps have other coefficients, and are Jordan's here. Documents and decoding are new: the
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
from models.parts.orthogonal import FITTED, JORDAN
from models.parts.precision import NORM_EPS, wide
from models.parts.sizes import Sizes
from models.regression.deep import forms
from models.regression.deep.memory import NetworkMemory, Parameters
from models.regression.deep.network import SwiGLU
from models.regression.deep.optimizers import Muon
from models.regression.deep.rules import AtEnd, Gates, Start
from models.regression.local.constant import Softmax
from models.regression.local.pairs import Pairs
from models.regression.regressor import Regressor, Tokens

BASE_RATE = 1e-3  # of the learning rates, at the start
COEFFICIENTS = {"jordan": JORDAN, "fitted": FITTED}


class State(NamedTuple):
    """memory: of the network. pairs: of the window, None without one."""

    memory: forms.State
    pairs: Pairs | None


class LaCT(NetworkMemory):
    """The layer above.

    grad_batch: b, a part of the model.  window: w, of attention; None for a mixer that has attention of its own.
    expansion: the network's inner width over K.  rank: of W_0 - I/2 and W_2 - I/2; None for matrices without a form.
    coefficients: jordan | fitted, of Newton and Schulz.  norm_eps: of the norm of m.
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
        window: int | None = 2048,
        expansion: float = 1.0,
        remat: int = 1,
        rank: int | None = None,
        coefficients: str = "jordan",
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__(sizes, backend, chunk, grad_batch, remat)
        D, H, _, K, V = sizes
        if (inner := round(expansion * K)) < 1:
            raise ValueError(f"regressor.expansion={expansion} leaves an inner width of {inner}; it must be positive")
        if rank is not None and rank < 1:
            raise ValueError(f"regressor.rank={rank} must be at least 1, or null for matrices without a form")
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"regressor.coefficients={coefficients} is not one of {', '.join(COEFFICIENTS)}")
        self.attention = None if window is None else Softmax(sizes, backend, window=window)
        self.rule = AtEnd(SwiGLU(), Muon(COEFFICIENTS[coefficients]), normed=True)
        self.rank, halves = rank, [(K, rank or 0), (rank or 0, inner)] * 2
        shapes, gain = [*(halves if rank else [(K, inner)] * 2), (inner, V)], 0.5 if rank else 1.0
        self.start = Parameters(torch.randn(H, n, m) / math.sqrt(n) for n, m in shapes)
        for half in list(self.start)[:-1]:
            half.data *= gain
        self.rates, self.momentum, self.scale = nn.Linear(D, 3 * H), nn.Linear(D, H), nn.Linear(D, H)
        nn.init.constant_(self.rates.bias, math.log(math.expm1(BASE_RATE)))  # the inverse of softplus
        self.norm = RMSNorm(V, norm_eps)

    def tokens_at_once(self, v: Tensor) -> int:
        return self.chunk or self.grad_batch

    def begin(self) -> Start:
        if self.rank is None:
            return Start(self.start(), True)
        a, b, c, d, down = self.start()
        half = torch.eye(a.shape[-2], b.shape[-1], dtype=a.dtype, device=a.device) / 2
        return Start((a @ b + half, c @ d + half, down), True)

    def gates(self, x: Tensor, log_decay: Tensor | None = None) -> Gates:
        rates = F.softplus(wide(self.rates(x))).unflatten(-1, (-1, 3))
        momentum = wide(self.momentum(x)).sigmoid()
        sums = torch.stack([torch.zeros_like(momentum), torch.ones_like(momentum), momentum], dim=-1) / self.grad_batch
        return Gates(rates, sums=sums)

    def forward(self, tokens: Tokens, state: State | None = None) -> tuple[Tensor, State]:
        memory, pairs = (None, None) if state is None else state
        read, memory = super().forward(tokens, memory)
        o = F.silu(wide(self.scale(tokens.x))).unsqueeze(-1) * wide(self.norm(read))
        if self.attention is not None:
            local, pairs = self.attention(tokens, pairs)
            o = o + local
        return o.to(tokens.v.dtype), State(memory, pairs)

    def forget(self, state: State, rows: Tensor) -> State:
        pairs = (
            state.pairs if self.attention is None or state.pairs is None else self.attention.forget(state.pairs, rows)
        )
        return State(super().forget(state.memory, rows), pairs)

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        return {}

    def flops_per_token(self, seq_len: int) -> int:
        """Three products with every weight: keys through two and, since the loss needs no prediction, errors back
        through the third; a write and a read of each. The projections of rates, momenta and scales, Muon's products at
        the end of each chunk, and attention.
        """
        weights = sum(w.numel() for w in self.begin().weights)
        gates = 10 * self.num_heads * self.hidden_size
        attention = 0 if self.attention is None else self.attention.flops_per_token(seq_len)
        return 6 * weights + gates + self.step_flops(seq_len) + attention

    def state_size(self, seq_len: int) -> int:
        attention = 0 if self.attention is None else self.attention.state_size(seq_len)
        return super().state_size(seq_len) + attention
