"""The delta rule: a memory that corrects itself.

Problem.    The same least squares as linear.py, fitted online: one gradient step for every pair, from the memory as it stands,
                S_t = S' - b_t d/dS 1/2 ||v_t - k_t S||^2  at  S' = a_t S_{t-1} .
Solution.   S_t = a_t S_{t-1} + b_t k_t^T (v_t - k_t a_t S_{t-1}) ,    o_t = q_t S_t .
            The pair writes only what the memory did not know yet, so similar keys overwrite one another instead of piling up. With
            |k| = 1, b = 0 writes nothing, b = 1 stores v exactly, b = 2 reflects along k; a step is stable while b |k|^2 < 2.
Members.    a = 1: the delta rule of Widrow and Hoff (1960) as a fast weight programmer (Schlag et al. 2021, section 4.2), trained in
            parallel as DeltaNet (Yang et al. 2024). A decay per head and token: Gated DeltaNet (Yang, Kautz and Hatamizadeh 2025,
            equation 10). b in (0, 2): negative eigenvalues, which state tracking needs (Grazzi et al. 2025).
            The decay comes before the step. Put it on the memory alone, S_t = a_t S_{t-1} + b_t k_t^T (v_t - k_t S_{t-1}), and it
            is another model, SGD with weight decay (leaky LMS); that one is this one with b/a for b and a v for v.
Exactness.  The chunked form equals the recurrence up to rounding, whatever the chunk, gradients included.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks, M = N B H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.regression.regressor import FORGET


def recurrent_delta(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time.

    q, k: [B, T, H, K].  v: [B, T, H, V].  step_size: [B, T, H], b above.  log_decay: [B, T, H], natural log of a, <= 0, or None for
    a = 1.  memory: [B, H, K, V] or None for zeros.
    Returns o [B, T, H, V] in the dtype of v, and the memory after the last token. Computed in float32 at least.
    """
    dtype = _working_dtype(q, k, v)
    out_dtype, (q, k, v, step_size) = v.dtype, (x.to(dtype) for x in (q, k, v, step_size))
    memory = _first_memory(k, v, memory)
    decay = None if log_decay is None else log_decay.to(dtype).exp()
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            if decay is not None:
                memory = decay[:, t, :, None, None] * memory
            error = v[:, t] - (k[:, t, :, None] @ memory).squeeze(-2)
            memory = memory + k[:, t, :, :, None] * (step_size[:, t, :, None] * error)[:, :, None]
            outputs.append((q[:, t, :, None] @ memory).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), memory


def chunked_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same map, C tokens at a time: one triangular system for each chunk, all at once, then a scan over chunks.

    Call u_t = b_t (v_t - k_t a_t S_{t-1}) what token t writes. Unrolled from the chunk's first memory S, with c the cumulative log
    decay, S_t = e^{c_t} S + sum_{i<=t} e^{c_t - c_i} k_i^T u_i, so the writes of a chunk solve a unit lower triangular system
    (Yang et al. 2024, section 3.2, with decays as in Yang et al. 2025, section 3.3):
        (I + A) U = diag(b) (V - diag(e^c) K S) ,    A_ti = b_t L_ti k_t.k_i  for i < t ,    L_ti = e^{c_t - c_i} .
    With R = (I + A)^-1 it falls into what is known before the memory is, and what waits for it:
        U = U' - W S ,    U' = R diag(b) V ,    W = R diag(b e^c) K ,    O = diag(e^c) Q S + (Q K^T * L) U ,
        S' = e^{c_C} S + Z^T U = (e^{c_C} I - Z^T W) S + Z^T U' ,    Z = diag(e^{c_C - c}) K .
    The last line is why the scan is cheap: one K x K matrix a chunk carries the memory over, a single product, forward and back.

    Arguments and results as in recurrent_delta. T need not be a multiple of the chunk.
    """
    B, T, H, _ = k.shape
    dtype = _working_dtype(q, k, v)
    chunk = min(chunk, 1 << max(T - 1, 3).bit_length())  # a short call needs no long chunk
    chunks = [_into_chunks(x.to(dtype), chunk) for x in (q, k, v)]  # [M, C, K]
    gates = [
        None if x is None else _into_chunks(x.to(dtype).unsqueeze(-1), chunk).squeeze(-1)
        for x in (step_size, log_decay)
    ]
    with torch.autocast(q.device.type, enabled=False):
        o, memory = _ChunkedDelta.apply(*chunks, *gates, _first_memory(k, v, memory).flatten(0, 1))
    o = o.view(-1, B, H, chunk, v.shape[-1]).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return o[:, :T].to(v.dtype), memory.unflatten(0, (B, H))


class _ChunkedDelta(torch.autograd.Function):
    """chunked_delta on [M, C, *], chunk by chunk: the chunks of one sequence are B H apart. The gradient is written by hand: it keeps
    a third of what autograd would, and its scan, like the forward's, is one product a chunk."""

    @staticmethod
    def forward(ctx, q, k, v, b, log_decay, memory):
        fade, start, end, last = _decays(k, log_decay)
        b = b.unsqueeze(-1)
        attend = torch.bmm(q, k.mT).mul_(fade)  # Q K^T * L
        R = _unit_inverse(torch.bmm(k, k.mT).mul_(fade).mul_(b))
        W = torch.bmm(R, k * (b * start))
        U = torch.bmm(R, v * b)
        Z = k * end
        carry = torch.bmm(Z.mT, W).neg_()
        carry.diagonal(dim1=-2, dim2=-1).add_(last)
        S = _scan(carry, torch.bmm(Z.mT, U), memory)  # [M + BH, K, V]: before every chunk, and after the last
        before = S[: len(q)]
        U.baddbmm_(W, before, alpha=-1)
        o = torch.bmm(q, before).mul_(start).baddbmm_(attend, U)
        ctx.save_for_backward(q, k, v, b, fade, start, end, attend, R, W, U, carry, S)
        ctx.has_decay = log_decay is not None
        return o, S[len(q) :].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dmemory):
        """With dX the gradient of the loss by X, and every line the transpose of one above:

        dU  = (Q K^T * L)^T dO + Z dS'                   E  = R^T dU , the gradient by the right hand side
        dS  = diag(e^c Q)^T dO + e^{c_C} dS' - W^T dU    which the scan takes as (e^{c_C} I - Z^T W)^T dS' + known
        dQ  = (dO U^T * L) K + diag(e^c) dO S^T
        dK  = diag(b) G + J ,  G = -(E U^T * L) K - diag(e^c) E S^T ,  J = dK through the keys that are read: what is left
        dV  = diag(b) E ,      db = E . V + K . G        (rows dotted)
        dc  = Q . dQ + K . (b G - J) ,  and S' . dS' for the last c, since e^{c_t} scales what token t reads with and e^{-c_i} what
              it wrote. The gradient of a log decay is the sum of dc from its token to the chunk's end.
        """
        q, k, v, b, fade, start, end, attend, R, W, U, carry, S = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            before, after = S[: len(q)], S[len(S) - len(q) :]
            dU = torch.bmm(attend.mT, do)
            dS = torch.bmm((q * start).mT, do).baddbmm_(W.mT, dU, alpha=-1)
            dS = _scan(carry.mT, dS, dmemory, reverse=True)
            dbefore, dafter = dS[: len(q)], dS[len(S) - len(q) :]
            dU.add_(torch.bmm(k, dafter).mul_(end))
            E = torch.bmm(R.mT, dU)
            dattend = torch.bmm(do, U.mT).mul_(fade)
            dA = torch.bmm(E, U.mT).mul_(fade)
            dA.diagonal(dim1=-2, dim2=-1).zero_()
            dq = torch.bmm(do, before.mT).mul_(start).baddbmm_(dattend, k)
            G = torch.bmm(E, before.mT).mul_(start).baddbmm_(dA, k).neg_()
            J = torch.bmm(U, dafter.mT).mul_(end).baddbmm_(dattend.mT, q).baddbmm_(dA.mT, k * b, alpha=-1)
            db = (E * v).sum(-1) + (k * G).sum(-1)
            G.mul_(b)
            dlog_decay = None
            if ctx.has_decay:
                dc = (q * dq).sum(-1) + (k * (G - J)).sum(-1)
                dc[:, -1] += (after * dafter).sum((-2, -1))
                dlog_decay = dc.flip(-1).cumsum(-1).flip(-1)
            return dq, G.add_(J), E.mul_(b), db, dlog_decay, dS[: len(dmemory)]


def _decays(k: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of a pair (i) where token t reads it: fade [M, C, C], L above; of the chunk's first memory at t: start [M, C, 1]; of a
    pair at the chunk's end: end [M, C, 1]; of the first memory there: last [M, 1].

    Only differences of cumulative log decays are exponentiated, and none is positive. A token at or below FORGET empties the memory; it
    is counted apart from the sum, so that 64 documents in a chunk leave the sum its digits: float32 resolves 4096 to 5e-4 only.
    """
    C = k.shape[1]
    causal = torch.ones(C, C, dtype=torch.bool, device=k.device).tril_()
    if log_decay is None:
        one = k.new_ones(())
        return causal.to(k.dtype), one, one, one
    forgets = log_decay <= FORGET
    document = forgets.cumsum(-1)
    c = log_decay.masked_fill(forgets, 0.0).cumsum(-1)
    hidden = (document.unsqueeze(-1) != document.unsqueeze(-2)).logical_or_(~causal)
    fade = (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill_(hidden, -torch.inf).exp_()
    start = c.exp().masked_fill_(document > 0, 0.0)
    end = (c[:, -1:] - c).exp_().masked_fill_(document < document[:, -1:], 0.0)
    return fade, start.unsqueeze(-1), end.unsqueeze(-1), start[:, -1:]


def _unit_inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 of the strictly lower triangle of A [M, C, C], by halves:
        [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]] ,
    from blocks of 4, where (I + A)^-1 = (I - A)(I + A^2) exactly. A few products of many small matrices: three times as fast as
    triangular solves on a CPU, and as accurate. Larger first blocks by the same series are not: with b = 2 and 64 times nearly the same
    key, float32, the error is 5e-5 from blocks of 4 (2e-4 by solves), 8e-4 from 8 and 4 from 16.
    """
    M, C, _ = A.shape
    size = 1 << max(C - 1, 3).bit_length()
    if size != C:
        return _unit_inverse(F.pad(A, (0, size - C, 0, size - C)))[:, :C, :C]
    blocks = _diagonal_blocks(A, 4).tril(-1).flatten(0, 1)
    square = blocks @ blocks
    inverse = (square - blocks).baddbmm_(blocks, square, alpha=-1)
    inverse.diagonal(dim1=-2, dim2=-1).add_(1.0)
    size = 4
    while size < C:
        pairs = inverse.view(-1, 2, size, size)
        below = _diagonal_blocks(A, 2 * size)[:, :, size:, :size].flatten(0, 1)
        double = A.new_zeros(len(pairs), 2, size, 2, size)
        double[:, 0, :, 0] = pairs[:, 0]
        double[:, 1, :, 1] = pairs[:, 1]
        double[:, 1, :, 0] = torch.bmm(torch.bmm(pairs[:, 1], below), pairs[:, 0]).neg_()
        size *= 2
        inverse = double.view(-1, size, size)
    return inverse


def _diagonal_blocks(A: Tensor, size: int) -> Tensor:
    """[M, C, C] to a view [M, C / size, size, size]."""
    return A.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _scan(carry: Tensor, add: Tensor, memory: Tensor, reverse: bool = False) -> Tensor:
    """S_{n+1} = carry_n S_n + add_n for carry [N BH, K, K], add [N BH, K, V], from memory [BH, K, V]: all S, [(N + 1) BH, K, V].
    In reverse, memory is the last S and carry_n makes S_n of S_{n+1}."""
    rows = len(memory)
    S = torch.cat((add, memory) if reverse else (memory, add))
    steps = range(0, len(add), rows)
    for n in reversed(steps) if reverse else steps:
        old, new = (n + rows, n) if reverse else (n, n + rows)
        S[new : new + rows].baddbmm_(carry[n : n + rows], S[old : old + rows])
    return S


def _into_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, X] to [N B H, C, X], zero-padded at the end: k = 0, b = 0, log decay 0 write nothing and forget nothing."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(0, 2)


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _first_memory(k: Tensor, v: Tensor, memory: Tensor | None) -> Tensor:
    dtype = _working_dtype(k, v)
    if memory is None:
        return torch.zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=dtype, device=k.device)
    return memory.to(dtype)
