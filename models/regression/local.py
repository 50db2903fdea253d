"""Local constant regression: softmax attention.

Problem.    Fit the memory anew for every query, the pairs near the query counting more:
                m_t = argmin_m  sum_{i<=t} w(q_t, k_i) ||v_i - m||^2 ,    w(q, k) = exp(beta q . k) .
Solution.   The weighted mean (Nadaraya 1964, Watson 1964), which is softmax attention:
                o_t = sum_i w(q_t, k_i) v_i / sum_i w(q_t, k_i) .
            With |q| and |k| fixed, w is a Gaussian kernel of their distance, exp(-beta |q - k|^2 / 2) up to a factor
            that cancels; without, it is no function of distance at all. That is what QK-norm is for (Wang, Shi and Fox
            2025, section 4.2), and 1 / beta is the bandwidth, learned.
Window.     With `window` W, only the last W pairs take part: t - W < i <= t.
State.      The pairs themselves. It grows with the sequence, or to W - 1 pairs with a window.
Exactness.  Both forms are exact. There is no cheaper one: T queries cost T (T + 1) / 2 comparisons.

Shapes: B batch, T tokens, S tokens in the cache, H query heads, G key-value heads (G divides H), K key width, V value
width.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import wide
from models.regression.regressor import Regressor
from models.sizes import Sizes


class Pairs(NamedTuple):
    """The key-value cache: k [B, S, G, K], v [B, S, G, V], and valid [B, S], false for pairs of earlier documents; None
    when all are valid.
    """

    k: Tensor
    v: Tensor
    valid: Tensor | None


def recurrent_softmax(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """The definition, one query at a time.

    q [B, T, H, K], already times beta; k [B, S + T, G, K] and v [B, S + T, G, V] with the cache in front; visible [B or
    1, T, S + T] says which pairs a query may use, and None means all up to its own. Returns o [B, T, H, V].
    """
    T, past = q.shape[1], k.shape[1] - q.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2).transpose(1, 2) for x in (k, v))  # [B, H, S + T, *]
    outputs = []
    for t in range(T):
        seen = past + t + 1
        scores = wide(q[:, t].unsqueeze(-2) @ k[:, :, :seen].mT)  # [B, H, 1, seen]
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, t : t + 1, :seen], -torch.inf)
        outputs.append((scores.softmax(-1).to(v.dtype) @ v[:, :, :seen]).squeeze(-2))
    return torch.stack(outputs, dim=1)


def parallel_softmax(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """The same for all queries at once, by torch's fused kernels. Arguments as in recurrent_softmax."""
    causal = visible is None and q.shape[1] > 1
    if causal and k.shape[1] > q.shape[1]:
        raise AssertionError("a cache and several queries need a mask: is_causal aligns at the first pair")
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if visible is None else visible.unsqueeze(1),
        is_causal=causal,
        scale=1.0,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


class Softmax(Regressor):
    """The local constant estimator with a Gaussian kernel.

    inverse_temperature: beta. "learned" is one per head, starting at sqrt(K), for keys and queries of length one:
    smaller, and the weights are nearly uniform. A number is fixed; K^-0.5 with qk_norm=rms is the attention of Qwen3.
    window: how many of the last pairs take part; None for all.
    """

    accepts_decay: ClassVar[tuple[str, ...]] = ("none",)
    grouped_heads: ClassVar[bool] = True
    function_class = "constant around q"
    fit = "closed form"

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        inverse_temperature: str | float = "learned",
        window: int | None = None,
    ) -> None:
        super().__init__(sizes, backend)
        if window is not None and window < 1:
            raise ValueError(f"regressor.window={window} must be at least 1, or null for no window")
        self.window = window
        if inverse_temperature == "learned":
            self.log_beta = nn.Parameter(torch.full((self.num_heads,), 0.5 * math.log(self.key_dim)))
        elif isinstance(inverse_temperature, int | float) and inverse_temperature > 0:
            self.log_beta = None
            self.beta = float(inverse_temperature)
        else:
            raise ValueError(
                f"regressor.inverse_temperature={inverse_temperature!r} must be 'learned' or a positive number"
            )

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return "scaled_dot_product_attention" if backend == "torch" else ""

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None = None,
        state: Pairs | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Pairs]:
        beta = self.beta if self.log_beta is None else self.log_beta.exp().to(q.dtype).unsqueeze(-1)
        T = q.shape[1]
        visible, valid = None, None
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], dim=1), torch.cat([state.v.to(v.dtype), v], dim=1)
        past = k.shape[1] - T
        needs_mask = (past and T > 1) or segments is not None or (state is not None and state.valid is not None)
        if needs_mask or (self.window is not None and k.shape[1] > self.window):
            visible, valid = self._visible(T, past, state, segments, q.device)
        form = recurrent_softmax if self.choose(q.device, q.dtype).backend == "recurrent" else parallel_softmax
        o = form(q * beta, k, v, visible)
        keep = k.shape[1] if self.window is None else min(self.window - 1, k.shape[1])
        first = k.shape[1] - keep
        return o, Pairs(k[:, first:], v[:, first:], None if valid is None else valid[:, first:])

    def _visible(
        self, T: int, past: int, state: Pairs | None, segments: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Which of the S + T pairs each of the T queries may use [B or 1, T, S + T], and which belong to the last
        document [B, S + T].
        """
        query = torch.arange(past, past + T, device=device).unsqueeze(1)
        pair = torch.arange(past + T, device=device)
        visible = pair <= query
        if self.window is not None:
            visible &= pair > query - self.window
        visible, valid = visible.unsqueeze(0), None
        if state is not None and state.valid is not None:
            valid = F.pad(state.valid, (0, T), value=True)
            visible = visible & valid.unsqueeze(1)
        if segments is not None:
            # the cache belongs to the first document of the call
            documents = torch.cat([segments[:, :1].expand(-1, past), segments], dim=1)
            visible = visible & (documents.unsqueeze(1) == segments.unsqueeze(2))
            last = documents == segments[:, -1:]
            valid = last if valid is None else valid & last
        return visible, valid

    def forget(self, state: Pairs, rows: Tensor) -> Pairs:
        """The pairs of the given rows stay, marked as another document's: the cache of a batch has one length."""
        valid = state.k.new_ones(state.k.shape[:2], dtype=torch.bool) if state.valid is None else state.valid
        return state._replace(valid=valid & ~rows.unsqueeze(1))

    def flops_per_token(self, seq_len: int) -> int:
        """A comparison and a weighted sum with every visible pair, on average over the sequence."""
        window = min(self.window or seq_len, seq_len)
        pairs = window * (window + 1) // 2 + (seq_len - window) * window
        return self.num_heads * 2 * (self.key_dim + self.value_dim) * pairs // seq_len

    def state_size(self, seq_len: int) -> int:
        pairs = seq_len if self.window is None else min(self.window - 1, seq_len)
        return pairs * self.num_kv_heads * (self.key_dim + self.value_dim)
