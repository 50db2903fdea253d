"""The delta rule with a line search: as far along the gradient as the last pairs are better known by it.

Problem.    The delta rule goes along the gradient of the newest pair's loss for a step that a gate has learned. Here
            the step is that which is best for the last w pairs of the document,
                eta* = argmin_eta  1/2 sum_{r<w} ||v_{t-r} - k_{t-r} (S' + eta k_t^T e_0)||^2 ,    S' = a_t S_{t-1} ,
            with e_r = v_{t-r} - k_{t-r} S' what the memory gets wrong of pair t - r.
Solution.   The loss is a parabola in eta. With c_r = k_{t-r} . k_t,
                eta* = sum_r c_r e_r . e_0 / (|e_0|^2 sum_r c_r^2) ,
                S_t = S' + b_t eta* k_t^T e_0 ,    o_t = q_t S_t .
            A gate b in (0, 1) takes a share of the way, so that the window's loss never grows. A pair whose key is like
            that of one before, with another value, is so written by less: what is known already has a say.
Members.    w = 1 has eta* = 1 / |k|^2: normalised LMS, and Gated DeltaNet where keys are of length one.
Exactness.  eta* is no linear function of the memory, so there is no parallel form: both backends loop over tokens.

Shapes: B batch, T tokens, H heads, K key width, V value width, W window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.parts.precision import NOTHING, wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.documents import forget_at_starts
from models.regression.linear.omega import windows
from models.regression.memory import Memory, first_memory
from models.regression.regressor import Tokens


class State(NamedTuple):
    """memory [B, H, K, V]. keys [B, W - 1, H, K] and values [B, W - 1, H, V]: the last pairs of the document, the
    newest last; zeros, which have no say, where it has fewer."""

    memory: Tensor
    keys: Tensor
    values: Tensor


def recurrent_line_search(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    share: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K]; keys [B, T, W, H, K] and values [B, T, W, H, V], the newest first, zero where there is none;
    share [B, T, H], b above; log_decay [B, T, H] or None. Returns o [B, T, H, V] and the last memory, in float32 at
    least.
    """
    dtype = working_dtype(q, keys, values)
    q, keys, values, share = (y.to(dtype) for y in (q, keys, values, share))
    S = first_memory(keys[:, :, 0], values[:, :, 0], memory)
    keys, values = keys.transpose(2, 3), values.transpose(2, 3)  # [B, T, H, W, *]
    with torch.autocast(q.device.type, enabled=False):
        alike = keys @ keys[..., :1, :].mT  # c_r, [B, T, H, W, 1]
        least = alike.square().sum(-2, keepdim=True)
        decay = torch.ones_like(share) if log_decay is None else log_decay.to(dtype).exp()
        # the query reads beside the keys, before the write, whose part in it is told by q . k
        rows = torch.cat([keys, q.unsqueeze(3)], dim=3)
        values = torch.cat([values, torch.zeros_like(values[..., :1, :])], dim=3)
        given = (rows, values, alike, least, share[..., None, None], decay[..., None, None], keys[..., :1, :].mT)
        read, written = [], []
        for row, value, c, square, b, a, key in zip(*(y.unbind(1) for y in given), strict=True):
            S = a * S
            error = value - row @ S  # of the last row, the query's, only what it reads
            newest = error[..., :1, :]
            along = error[..., :-1, :] @ newest.mT  # e_r . e_0, [B, H, W, 1]
            step = (c * along).sum(-2, keepdim=True) / (along[..., :1, :] * square + NOTHING)
            write = b * step * newest
            S = S + key @ write
            read.append(-error[..., -1, :])
            written.append(write.squeeze(-2))
        o = torch.stack(read, dim=1) + (q * keys[..., 0, :]).sum(-1, keepdim=True) * torch.stack(written, dim=1)
    return o, S


class LineSearch(Memory):
    """The rule above. window: w, in pairs."""

    weighs_values = False  # the step depends on values

    def __init__(self, sizes: Sizes, backend: str = "auto", chunk: int | None = None, window: int = 4) -> None:
        super().__init__(sizes, backend, chunk)
        if window < 1:
            raise ValueError(f"regressor.window={window} is no number of pairs; a positive integer")
        self.window, self.fit = window, f"gradient step, best for {window} pairs"
        self.share = nn.Linear(sizes.hidden_size, sizes.num_heads)

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        seen = torch.ones(*k.shape[:3], self.window, dtype=q.dtype, device=q.device)
        past = () if state is None else (state.keys, state.values)
        keys, values, seen, *last = windows(k, v, seen, past, working_dtype(q, k, v), segments)
        keys = keys * seen.movedim(3, 2).unsqueeze(-1).to(keys.dtype)  # of no other document
        log_decay = forget_at_starts(log_decay, segments, like=q)
        memory = None if state is None else state.memory
        o, memory = recurrent_line_search(q, keys, values, wide(self.share(x)).sigmoid(), log_decay, memory)
        return o.to(v.dtype), State(memory, *last)

    def forget(self, state: State, rows: Tensor) -> State:
        return State._make(torch.where(rows.view(-1, 1, 1, 1), 0.0, y) for y in state)

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"share": wide(self.share(tokens.x)).sigmoid()}

    def flops_per_token(self, seq_len: int) -> int:
        """What the memory says at W keys and at the query, W products of errors and of keys, a write; and the share."""
        K, V, W = self.key_dim, self.value_dim, self.window
        return self.num_heads * (2 * K * V * (W + 2) + 2 * W * (K + V) + 2 * self.hidden_size)

    def state_size(self, seq_len: int) -> int:
        return super().state_size(seq_len) + (self.window - 1) * self.num_heads * (self.key_dim + self.value_dim)
