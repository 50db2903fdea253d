"""Softmax whose channels fade: what a pair is found by wears off, not the pair.

Problem.    Local constant regression (constant.py), with weights by a product of query and key in which every channel
            of the key has faded by its own rate since the pair was stored:
                w_ti = exp(beta sum_j q_tj k_ij g_tij) ,    g_ti = gamma_{i+1} * ... * gamma_t per channel j.
Solution.   o_t = sum_i w_ti v_i / sum_i w_ti .
            A channel that fades fast looks at the last pairs alone, one that does not looks at all. A pair whose
            channels have all faded is not forgotten: its weight is then 1, that of a pair that has nothing to do with
            the query. Forgetting (constant.py) multiplies the weight itself by a decay, until it is 0. With gamma = 1
            both are softmax; with equal channels this is softmax at a temperature that grows with the distance. No
            channels that keys and queries share freely make it forgetting, but one of its own does: where it has the
            key 1, the query L and the fade g^(1 / (beta L)), and nothing else fades, the logit is beta (q.k + L) +
            log g in the limit of a large L.
Source.     Wall attention (Averbuch and Pai, Tilde Research; fla 0.6.0, ops/wall_attn and layers/wall_attn.py). Its
            layer projects the gates without a bottleneck and has no QK-norm by default.
State.      The pairs, and how far every channel of every head has faded: it grows with the sequence.
Exactness.  Exact. Before a block of queries, fades go through the block's first token: no exponent is positive. Inside
            one, each pair of tokens has its own, C^2 K numbers.

Shapes: as in pairs.py, and C queries of a block. Ages are kept as [B, S, H K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.parts.precision import working_dtype
from models.regression.local.constant import Softmax, of_heads
from models.regression.local.pairs import Pairs, View, by_head, in_blocks
from models.regression.regressor import Tokens


def faded_products(q: Tensor, q_age: Tensor, k: Tensor, k_age: Tensor) -> Tensor:
    """sum_j q_tj k_ij g_tij [B, H, T, S] by its definition, T S K numbers. q, q_age [B, H, T, K], k, k_age
    [B, H, S, K], ages in logarithms. Of pairs that lie in another document, any number that is finite."""
    fade = (k_age.unsqueeze(2) - q_age.unsqueeze(3)).clamp(max=0.0).to(q.dtype).exp()
    return ((fade * k.unsqueeze(2)) @ q.unsqueeze(-1)).squeeze(-1)


def through_the_first(q: Tensor, q_age: Tensor, k: Tensor, k_age: Tensor) -> Tensor:
    """The same for queries that are tokens of their own, and the last of the pairs: by one product for the pairs before
    all queries, which have faded until the first query, and then with the queries."""
    before, first = k.shape[2] - q.shape[2], q_age[:, :, :1]
    inside = faded_products(q, q_age, k[:, :, before:], k_age[:, :, before:])
    if not before:
        return inside
    read = q * (first - q_age).clamp(max=0.0).to(q.dtype).exp()
    kept = k[:, :, :before] * (k_age[:, :, :before] - first).clamp(max=0.0).to(k.dtype).exp()
    return torch.cat([read @ kept.mT, inside], dim=-1)


def block_of_wall(
    visible: Tensor, q: Tensor, q_age: Tensor, k: Tensor, k_age: Tensor, v: Tensor, beta: Tensor
) -> Tensor:
    """The weighted means for a block of queries. visible [B or 1, 1, C, S], beta [H, 1, 1]."""
    logits = beta * through_the_first(q, q_age, k, k_age)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v


def recurrent_wall(q: Tensor, q_age: Tensor, k: Tensor, k_age: Tensor, v: Tensor, beta: Tensor, view: View) -> Tensor:
    """The definition, one query at a time. Arguments as in faded_products and block_of_wall; o [B, H, T, V]."""
    outputs = []
    for t in range(q.shape[2]):
        now, seen = slice(t, t + 1), view.reach(slice(t, t + 1))
        logits = beta * faded_products(q[:, :, now], q_age[:, :, now], k[:, :, seen], k_age[:, :, seen])
        visible = view.visible(now, seen, q.device).unsqueeze(1)
        outputs.append(logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, :, seen])
    return torch.cat(outputs, dim=2)


class Wall(Softmax):
    """Softmax with a decay per head and channel in its products. inverse_temperature, window, block: pairs.py."""

    accepts_decay: tuple[str, ...] = ("channel",)

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        if self.kernel != "gaussian":
            raise ValueError(f"regressor.kernel={self.kernel}: channels fade in a product; only gaussian has one")

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        return {}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return "blocks of queries" if backend == "torch" else ""

    def forward(self, tokens: Tokens, state: Pairs | None = None) -> tuple[Tensor, Pairs]:
        x, q, k, v, log_decay, segments = tokens
        assert log_decay is not None
        return super().forward(Tokens(x, q, k, v, log_decay.flatten(2), segments), state)

    def read(self, q: Tensor, pairs: Pairs, view: View) -> Tensor:
        dtype, H = working_dtype(q, pairs.k), self.num_heads
        k, v = by_head(pairs.k, H, dtype), by_head(pairs.v, H, dtype)
        assert pairs.age is not None
        age = pairs.age.unflatten(-1, (H, -1)).transpose(1, 2)
        queries, beta = (q.transpose(1, 2).to(dtype), age[:, :, view.past :]), of_heads(self.beta(q))
        with torch.autocast(q.device.type, enabled=False):
            if self.choose(q.device, q.dtype).backend == "recurrent":
                o = recurrent_wall(*queries, k, age, v, beta, view)
            else:
                o = in_blocks(block_of_wall, queries, (k, age, v), (beta,), view, self.queries_at_once(q))
        return o.transpose(1, 2).to(pairs.v.dtype)

    def queries_at_once(self, q: Tensor) -> int:
        return self.block or 64

    def state_size(self, seq_len: int) -> int:
        """The pairs, and of each how far every channel of every head has faded."""
        pairs = seq_len if self.window is None else min(self.window - 1, seq_len)
        return super().state_size(seq_len) + pairs * self.num_heads * self.key_dim
