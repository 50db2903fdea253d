"""Least squares with a decay per channel: pairs whose keys fade channel by channel.

Problem.    A weight for each pair is one number, so a decay per channel has no weighted least squares (mesa refuses
            it). But the keys themselves may fade, each channel at its own rate, and the values at the mean rate:
                M_t = argmin_M  1/2 sum_{i<=t} b_i ||f_ti v_i - (k_i * F_ti) M||^2 + 1/2 tr(M^T Lambda M) ,
                F_ti = sqrt(a_{i+1} * ... * a_t) [K] ,    f_ti = the geometric mean of F_ti over channels.
Solution.   With s_t = diag(sqrt(a_t)) and f_t the geometric mean of its channels,
                H_t = s_t H_{t-1} s_t + b_t k_t^T k_t ,    G_t = f_t s_t G_{t-1} + b_t k_t^T v_t ,
                o_t = q_t (H_t + Lambda)^-1 G_t .
            What has faded in a channel no longer says what that channel of a key should mean.
Members.    Equal channels are mesa.
Exactness.  The chunked form has the moments of every token, in chunks, and solves all systems by Cholesky. It holds K
            (K + V) numbers for every token, as long as a call lasts: it is for small models.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts import solves
from models.parts.precision import wide
from models.parts.sizes import Sizes
from models.regression.documents import forget_at_starts
from models.regression.least_squares.moments import Moments, first_moments, forget
from models.regression.memory import Memory
from models.regression.regressor import Tokens

LEAST_RIDGE = 0.25  # as mesa's


def recurrent_fading_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write_weight: Tensor,
    ridge: Tensor,
    log_decay: Tensor,
    moments: Moments | None = None,
) -> tuple[Tensor, Moments]:
    """The definition, token by token. q, k, log_decay [B, T, H, K], v [B, T, H, V], write_weight [B, T, H], ridge [H,
    K]. Returns o [B, T, H, V] and the last moments, in whose dtype all is computed."""
    keys, pairs, _ = first_moments(q, k, v, moments)
    q, k, v, b, half = (y.to(keys.dtype) for y in (q, k, v, write_weight, log_decay / 2))
    penalty, outputs = torch.diag_embed(ridge.to(keys.dtype)), []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            s, mean = half[:, t].exp().unsqueeze(-1), half[:, t].mean(-1).exp()[..., None, None]
            write = (b[:, t, :, None] * k[:, t]).unsqueeze(-1)
            keys = s * keys * s.mT + write @ k[:, t].unsqueeze(2)
            pairs = s * pairs * mean + write @ v[:, t].unsqueeze(2)
            x = solves.solve(keys + penalty, q[:, t])
            outputs.append((x.unsqueeze(2) @ pairs).squeeze(2))
    return torch.stack(outputs, dim=1), Moments(keys, pairs)


def chunked_fading_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write_weight: Tensor,
    ridge: Tensor,
    log_decay: Tensor,
    moments: Moments | None = None,
    chunk: int = 16,
) -> tuple[Tensor, Moments]:
    """The same. With c the cumulative sum of log a / 2 in a chunk, a pair i of it is at token t the key k_i e^(c_t -
    c_i); what came before the chunk is its first moments, faded by e^(c_t) on both sides."""
    first = first_moments(q, k, v, moments)
    dtype, T = first.keys.dtype, q.shape[1]
    padding = -T % chunk  # tokens that write nothing, and do not fade

    def laid(y: Tensor) -> Tensor:
        """[B, T, H, *] as [B, N, H, C, *]."""
        y = F.pad(y.to(dtype), (*[0, 0] * (y.ndim - 2), 0, padding))
        return y.unflatten(1, (-1, chunk)).transpose(2, 3)

    with torch.autocast(q.device.type, enabled=False):
        keys, values, b, c = laid(k), laid(v), laid(write_weight.unsqueeze(-1)), laid(log_decay / 2).cumsum(3)
        mean = c.mean(-1, keepdim=True)
        later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)  # i behind t
        age = (c.unsqueeze(4) - c.unsqueeze(3)).masked_fill(later.unsqueeze(-1), -torch.inf)  # [B, N, H, t, i, K]
        faded = age.exp() * keys.unsqueeze(3)
        weighted = (faded * b.unsqueeze(3)).mT
        left = (mean - mean.mT).masked_fill(later, -torch.inf).exp().unsqueeze(-1)  # of values, [B, N, H, t, i, 1]
        of_keys, of_pairs = weighted @ faded, weighted @ (left * values.unsqueeze(3))  # [B, N, H, t, K, *]
        s, f = c.exp().unsqueeze(-1), mean.exp().unsqueeze(-1)
        before_keys, before_pairs = [first.keys], [first.pairs]
        for n in range(keys.shape[1]):  # each chunk's last token is the next one's past
            end = s[:, n, :, -1]
            before_keys.append(of_keys[:, n, :, -1] + end * before_keys[-1] * end.mT)
            before_pairs.append(of_pairs[:, n, :, -1] + end * before_pairs[-1] * f[:, n, :, -1])
        of_keys = of_keys + s * torch.stack(before_keys[:-1], dim=1).unsqueeze(3) * s.mT
        of_pairs = of_pairs + s * torch.stack(before_pairs[:-1], dim=1).unsqueeze(3) * f
        L = solves.cholesky(of_keys + torch.diag_embed(ridge.to(dtype)).unsqueeze(1))
        x = torch.cholesky_solve(laid(q).unsqueeze(-1), L)
        o = (x.mT @ of_pairs).squeeze(-2).transpose(2, 3).flatten(1, 2)[:, :T]
    return o, Moments(before_keys[-1], before_pairs[-1])


class FadingKeys(Memory):
    """The fit above, with learned write weights b = sigmoid(x W + c) and a learned ridge per channel, 1 at the
    start."""

    accepts_decay = ("none", "head", "channel")
    fit = "least squares of fading keys, Cholesky"

    def __init__(self, sizes: Sizes, backend: str = "auto", chunk: int | None = None) -> None:
        super().__init__(sizes, backend, chunk)
        first = torch.full((self.num_heads, self.key_dim), 1 - LEAST_RIDGE)
        self.ridge = nn.Parameter(first.expm1().log())  # softplus inverted
        self.write_weight = nn.Linear(sizes.hidden_size, sizes.num_heads)

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        return self._fit(tokens, wide(self.write_weight(tokens.x)).sigmoid(), state)

    def recall(self, x: Tensor, q: Tensor, state: Moments | None) -> Tensor:
        k, v = torch.zeros_like(q), q.new_zeros(*q.shape[:3], self.value_dim)
        return self._fit(Tokens(x, q, k, v), wide(v[..., 0]), state)[0]

    def _fit(self, tokens: Tokens, b: Tensor, state: Moments | None) -> tuple[Tensor, Moments]:
        _, q, k, v, log_decay, segments = tokens
        log_decay = forget_at_starts(log_decay, segments, like=q)
        if log_decay is None:
            log_decay = wide(torch.zeros_like(q[..., 0]))
        if log_decay.ndim == 3:
            log_decay = log_decay.unsqueeze(-1).expand_as(k)
        given = q, k, v, b, LEAST_RIDGE + F.softplus(wide(self.ridge)), log_decay, state
        if self.choose(v.device, v.dtype).backend == "recurrent":
            o, state = recurrent_fading_keys(*given)
        else:
            o, state = chunked_fading_keys(*given, min(self.tokens_at_once(v), 16, q.shape[1]))
        return o.to(v.dtype), state

    def forget(self, state: Moments, rows: Tensor) -> Moments:
        return forget(state, rows)

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"write_weight": wide(self.write_weight(tokens.x)).sigmoid()}

    def flops_per_token(self, seq_len: int) -> int:
        """Two writes, a read, and the projection; the solve is no product, and not counted, as mesa's is not."""
        K, V = self.key_dim, self.value_dim
        return 2 * self.num_heads * (K * K + 2 * K * V + self.hidden_size)

    def state_size(self, seq_len: int) -> int:
        return self.num_heads * self.key_dim * (self.key_dim + self.value_dim)
