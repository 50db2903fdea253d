"""Recursive least squares: the inverse itself, kept up to date.

Problem.    That of least_squares.py, with a ridge that fades like everything else that was known at the start:
                S_t = argmin_S  sum_{i<=t} w_ti ||v_i - k_i S||^2 + (gamma_1 ... gamma_t) sum_j Lambda_j ||S_j||^2 .
Solution.   P_t = (H_t + gamma_1 ... gamma_t Lambda)^{-1} by Sherman, Morrison and Woodbury (von Oswald et al. 2023):
                P' = P_{t-1} / gamma_t ,    g_t = b_t P' k_t^T / (1 + b_t k_t P' k_t^T) ,
                P_t = P' - g_t k_t P' ,     S_t = S_{t-1} + g_t (v_t - k_t S_{t-1}) .
            It is the delta rule with the one direction g_t in place of b_t k_t^T that makes every step exact: the
            Kalman filter of a constant S.
Limits.     A loop over tokens, and with gamma < 1 it winds up: what keys no longer excite, the fading ridge holds no
            more, and P grows as 1 / gamma per token. With one key 2048 times over that is an error of 8e-6 for pairs in
            float32, whose moments are float64, where gamma_1 ... gamma_t is 1e-8, and of 5e-4 where it is 1e-10. A
            reference, for short sequences or gamma near 1.

Shapes as in least_squares.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.parts.solves import inverse, solve
from models.regression.least_squares.moments import Moments, first_moments


def recurrent_fading_ridge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write_weight: Tensor,
    ridge: Tensor,
    log_decay: Tensor | None = None,
    moments: Moments | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """The definition: H_t and G_t as in least_squares.py, and a solve for every token.

    Arguments and results as in recurrent_least_squares; ridge [H, K]; starts [B, T]: true at the first tokens of
    documents that begin inside the call, where the memory is empty and the ridge whole again.
    """
    tokens, H, G, log_ridge = _tokens(q, k, v, write_weight, log_decay, moments, starts)
    ridge, outputs = ridge.to(H.dtype), []
    with torch.autocast(q.device.type, enabled=False):
        for token in tokens:
            H, G, log_ridge = _after(H, G, log_ridge, token)
            A = H + torch.diag_embed(log_ridge.exp().unsqueeze(-1) * ridge)
            outputs.append(_read(solve(A, token.q), G))
        return torch.stack(outputs, dim=1).to(v.dtype), Moments(H, G, log_ridge)


def recursive_least_squares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write_weight: Tensor,
    ridge: Tensor,
    log_decay: Tensor | None = None,
    moments: Moments | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """The same by the recursion above, from one inverse at the beginning of the call. Arguments and results as in
    recurrent_fading_ridge."""
    tokens, H, G, log_ridge = _tokens(q, k, v, write_weight, log_decay, moments, starts)
    ridge, outputs = torch.diag_embed(ridge.to(H.dtype)), []
    with torch.autocast(q.device.type, enabled=False):
        P = inverse(H + log_ridge.exp()[..., None, None] * ridge)
        S, first_P = P @ G, inverse(ridge)
        for token in tokens:
            H, G, log_ridge = _after(H, G, log_ridge, token)
            P, S = torch.where(token.start, first_P, P) / token.decay, S.masked_fill(token.start, 0.0)
            Pk = (P @ token.k.unsqueeze(-1)).squeeze(-1)
            gain = token.b * Pk / (1 + token.b * torch.linalg.vecdot(token.k, Pk).unsqueeze(-1))
            S = S + gain.unsqueeze(-1) * (token.v - _read(token.k, S)).unsqueeze(-2)
            P = P - gain.unsqueeze(-1) * Pk.unsqueeze(-2)
            outputs.append(_read(token.q, S))
        return torch.stack(outputs, dim=1).to(v.dtype), Moments(H, G, log_ridge)


class _Token(NamedTuple):
    """q, k [B, H, K], v [B, H, V], b [B, H, 1], start [B, 1, 1, 1], log_decay [B, H], its exponential [B, H, 1, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    start: Tensor
    log_decay: Tensor
    decay: Tensor


def _tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    moments: Moments | None,
    starts: Tensor | None,
) -> tuple[list[_Token], Tensor, Tensor, Tensor]:
    """The arguments token by token, in the dtype of the moments, and the moments to begin with."""
    H, G, log_ridge = first_moments(q, k, v, moments)
    dtype, log_ridge = H.dtype, H.new_zeros(H.shape[:2]) if log_ridge is None else log_ridge
    log_decay = torch.zeros_like(b, dtype=dtype) if log_decay is None else log_decay.to(dtype)
    starts = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device) if starts is None else starts
    decay = log_decay.exp()[..., None, None]
    columns = (*(x.to(dtype) for x in (q, k, v, b.unsqueeze(-1))), starts[..., None, None, None], log_decay, decay)
    return [_Token(*token) for token in zip(*(x.unbind(1) for x in columns), strict=True)], H, G, log_ridge


def _after(H: Tensor, G: Tensor, log_ridge: Tensor, token: _Token) -> tuple[Tensor, Tensor, Tensor]:
    """The moments after a token."""
    H, G = (x.masked_fill(token.start, 0.0) * token.decay for x in (H, G))
    write = (token.b * token.k).unsqueeze(-1)
    log_ridge = log_ridge.masked_fill(token.start.flatten(1), 0.0) + token.log_decay
    return H + write @ token.k.unsqueeze(-2), G + write @ token.v.unsqueeze(-2), log_ridge


def _read(x: Tensor, memory: Tensor) -> Tensor:
    return (x.unsqueeze(-2) @ memory).squeeze(-2)
