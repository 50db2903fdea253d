"""Linear attention: a memory that only adds.

Problem.    At every step, fit a linear map to the pairs seen so far, the older ones counting less:
                M_t = argmin_M  1/2 sum_{i<=t} g_i^(t) w_i ||v_i - k_i M||^2 ,    g_i^(t) = prod_{i<j<=t} gamma_j .
Solution.   M_t = (K^T G K)^-1 K^T G V with G = diag(g^(t) w). Take the keys for orthonormal, and the inverse is gone:
                M_t = gamma_t M_{t-1} + w_t k_t^T v_t ,    o_t = q_t M_t ,
            which is one gradient step from zero (Wang, Shi and Fox 2025, section 4.1). The price is interference:
            pairs with similar keys blur into each other. delta.py corrects it pair by pair, least_squares.py pays for
            the inverse.
Normaliser. With positive features, o_t = q_t M_t / q_t z_t with z_t = gamma_t z_{t-1} + w_t k_t is a weighted mean of
            the values: constant.py's estimator with the kernel phi(q) . phi(k) in place of the exponential.
Members.    gamma = 1: linear attention (Katharopoulos et al. 2020, section 3.2). One fixed gamma per head: RetNet (Sun
            et al. 2023). One per head and token: Mamba-2 (Dao and Gu 2024), whose pairs also write the less, the less
            the memory forgets (`held`, below). One per channel and token: GLA (Yang et al. 2024). Signed w: pairs can
            be taken back. Signed gamma: the memory can turn around.
Exactness.  The chunked form equals the recurrence up to rounding, whatever the chunk.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks, M = N B H, R = B H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import fla
from models.parts.linear import read
from models.parts.precision import wide
from models.parts.sizes import Sizes
from models.regression import halvings
from models.regression.chunks import fades, from_chunks, into_chunks, short
from models.regression.documents import forget_at_starts
from models.regression.memory import Memory, first_memory
from models.regression.regressor import Tokens


def recurrent_linear(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time.

    q, k: [B, T, H, K].  v: [B, T, H, V].  log_decay: [B, T, H] or [B, T, H, K], natural log of gamma, <= 0, or None for
    gamma = 1.  memory: [B, H, K, V] or None for zeros.
    Returns o [B, T, H, V] in the dtype of v, and the memory after the last token. Computed in float32 at least.
    """
    memory = first_memory(k, v, memory)
    out_dtype, (q, k, v) = v.dtype, (x.to(memory.dtype) for x in (q, k, v))
    decay = None if log_decay is None else log_decay.to(memory.dtype).exp().view(*log_decay.shape[:3], -1, 1).unbind(1)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for t, (q_t, k_t, v_t) in enumerate(zip(*(x.unbind(1) for x in (q, k, v)), strict=True)):
            if decay is not None:
                memory = decay[t] * memory
            memory = memory + k_t.unsqueeze(-1) @ v_t.unsqueeze(-2)
            outputs.append((q_t.unsqueeze(-2) @ memory).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), memory


def chunked_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """The same map, C tokens at a time: attention inside a chunk, the memory between (Dao and Gu 2024, section 6).

    With L the fades within a chunk, a those since its start and z those to its end (chunks.py):
        O = (Q K^T * L) V + diag(a) Q M ,    M' = a_C M + (diag(z) K)^T V .
    A decay per channel goes inside the product, (Q K^T * L)_ti = sum_k q_tk L_tik k_ik, which takes a product for each
    halving of a chunk (halvings.py). Arguments and results as in recurrent_linear, and T need not be a multiple of C.
    """
    memory = first_memory(k, v, memory)
    B, T, H, _ = k.shape
    per_channel = log_decay is not None and log_decay.ndim == 4
    chunk = short(chunk, T)
    with torch.autocast(q.device.type, enabled=False):
        Q, K, V, g = (into_chunks(x, chunk, memory.dtype) for x in (q, k, v, log_decay))
        if per_channel:
            (attention,) = halvings.scores([halvings.Reader(Q)], K, g)
            start, end = g.cumsum(1).exp(), halvings.after(g).exp()
        else:
            within, start, end = fades(K, g)
            attention = Q @ K.mT * within
        writes = ((K * end).mT @ V).unflatten(0, (-1, B * H))  # [N, R, K, V]
        totals = None if g is None else g.sum(1).unflatten(0, (-1, B * H))  # [N, R, 1 or K]
        memories = _memories(writes, totals, memory.flatten(0, 1))
        o = attention @ V + (Q * start) @ memories[:-1].flatten(0, 1)
    return from_chunks(o, (B, T, H)).to(v.dtype), memories[-1].unflatten(0, (B, H))


def _memories(writes: Tensor, totals: Tensor | None, memory: Tensor) -> Tensor:
    """The memory [R, K, V] before every chunk and after the last, [N + 1, R, K, V]. Chunks are to each other as tokens
    are inside one, so the same fades serve, and no loop walks along them. writes [N, R, K, V]; totals [N, R, 1 or K],
    the log decay of whole chunks.
    """
    if totals is None:
        return torch.cat([memory.unsqueeze(0), writes]).cumsum(0)
    within, start, _ = fades(writes[..., 0].transpose(0, 1), totals.transpose(0, 1))  # [R, N, N (, K)], [R, N, 1 or K]
    subscripts = "rnm,mrkv->nrkv" if within.ndim == 3 else "rnmk,mrkv->nrkv"
    after = torch.einsum(subscripts, within, writes) + start.transpose(0, 1).unsqueeze(-1) * memory
    return torch.cat([memory.unsqueeze(0), after])


WRITES = ("all", "weighted", "signed", "held")


class Linear(Memory):
    """The Hebbian memory: no step sizes, no correction.

    writes: how much each pair counts, w above: `all` 1; `weighted` sigmoid(x W + c); `signed` 2 sigmoid(x W + c) - 1,
        so that a pair can also be taken back; `held` 1 - gamma, a zero-order hold: what a state space model with
        dM/dt = -r M + k^T v holds after a step in which the pair is constant, up to the factor 1/r (Mamba-2's own
        weight, the step, is its first-order term). It needs a decay per head.
    normalizer: divide by q_t z_t; for positive features only.
    """

    accepts_decay: tuple[str, ...] = ("none", "head", "channel", "signed")
    reads = ("write_weight",)

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        writes: str = "all",
        normalizer: bool = False,
    ) -> None:
        super().__init__(sizes, backend, chunk)
        if writes not in WRITES:
            raise ValueError(f"regressor.writes={writes} is not one of {', '.join(WRITES)}")
        self.writes, self.normalizer = writes, normalizer
        self.fit = "step from zero, normalised" if normalizer else "step from zero"
        if writes == "held":
            self.accepts_decay = ("head",)
        if normalizer:
            self.needs_positive_features = True
        learned = writes in ("weighted", "signed")
        self.write_weight = nn.Linear(sizes.hidden_size, sizes.num_heads) if learned else None

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        if (weight := self._weight(x, log_decay)) is not None:
            k = (k * weight.unsqueeze(-1)).to(k.dtype)
        if self.normalizer:  # z is the memory of a value that is always one
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        o, memory = self._fit(q, k, v, forget_at_starts(log_decay, segments, like=v), state)
        return self._normalised(o), memory

    def recall(self, x: Tensor, q: Tensor, state: Any) -> Tensor:
        return self._normalised(super().recall(x, q, state))

    def _normalised(self, o: Tensor) -> Tensor:
        return o[..., :-1] / o[..., -1:].clamp(min=1e-6) if self.normalizer else o

    def _fit(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, memory: Any) -> tuple[Tensor, Tensor]:
        backend = self.choose(v.device, v.dtype).backend
        if backend == "recurrent" or k.shape[1] == 1:
            return recurrent_linear(q, k, v, log_decay, memory)
        if backend == "fla":
            return fla.linear(q, k, v, log_decay, memory)
        return chunked_linear(q, k, v, log_decay, memory, self.tokens_at_once(v))

    def _weight(self, x: Tensor, log_decay: Tensor | None) -> Tensor | None:
        """w [B, T, H], or None for one."""
        if self.writes == "held":
            assert log_decay is not None
            return -torch.expm1(log_decay)
        if self.write_weight is None:
            return None
        weight = wide(read(self.write_weight, x)).sigmoid()
        return 2 * weight - 1 if self.writes == "signed" else weight

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        weight = self._weight(tokens.x, tokens.log_decay)
        return {} if weight is None else {"write_weight": weight}

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        return {"fla": fla.refusal_linear(device, dtype)}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return fla.route_linear(device, self.decay_kind) if backend == "fla" else ""

    def flops_per_token(self, seq_len: int) -> int:
        """Two products with the memory (write, read), and the weights' projection."""
        weights = 2 * self.hidden_size if self.write_weight is not None else 0
        return self.num_heads * (4 * self.key_dim * self.columns + weights)

    @property
    def columns(self) -> int:
        return self.value_dim + self.normalizer
