"""The delta rule: a memory that corrects itself.

Problem.    The same least squares as linear.py, fitted online: one gradient step a pair, from the memory as it stands,
                S_t = S' - b_t d/dS 1/2 ||v_t - k_t S||^2  at  S' = a_t S_{t-1} .
Solution.   S_t = a_t S_{t-1} + b_t k_t^T (v_t - k_t a_t S_{t-1}) ,    o_t = q_t S_t .
            The pair writes only what the memory did not know yet, so similar keys overwrite one another instead of
            piling up. With |k| = 1, b = 0 writes nothing, b = 1 stores v exactly, b = 2 reflects along k; a step is
            stable while b |k|^2 < 2.
Members.    a = 1: the delta rule of Widrow and Hoff (1960) as a fast weight programmer (Schlag et al. 2021, section
            4.2), trained in parallel as DeltaNet (Yang et al. 2024). A decay per head and token: Gated DeltaNet (Yang,
            Kautz and Hatamizadeh 2025, equation 10). b in (0, 2): negative eigenvalues, which state tracking needs
            (Grazzi et al. 2025).
            The decay comes before the step. Put it on the memory alone, a_t S_{t-1} + b_t k_t^T (v_t - k_t S_{t-1}),
            and it is another model: SGD with weight decay, leaky LMS. That one is this one with b/a for b, a v for v.
Exactness.  The chunked form equals the recurrence up to rounding, whatever the chunk, gradients included.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks, M = N B H.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.kernels import fla
from models.precision import wide, working_dtype
from models.regression.chunks import fades, from_chunks, into_chunks, short, unit_inverse
from models.regression.documents import forget_at_starts
from models.regression.memory import Memory, first_memory
from models.sizes import Sizes


def recurrent_delta(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time.

    q, k: [B, T, H, K].  v: [B, T, H, V].  step_size: [B, T, H], b above.  log_decay: [B, T, H], natural log of a, <= 0,
    or None for a = 1.  memory: [B, H, K, V] or None for zeros.
    Returns o [B, T, H, V] in the dtype of v, and the memory after the last token. Computed in float32 at least.
    """
    dtype = working_dtype(q, k, v)
    out_dtype, (q, k, v, step_size) = v.dtype, (x.to(dtype) for x in (q, k, v, step_size))
    memory = first_memory(k, v, memory)
    decay = None if log_decay is None else log_decay.to(dtype).exp()
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            if decay is not None:
                memory = decay[:, t, :, None, None] * memory
            error = v[:, t] - (k[:, t, :, None] @ memory).squeeze(-2)
            memory = memory + k[:, t, :, :, None] @ (step_size[:, t, :, None] * error)[:, :, None]
            outputs.append((q[:, t, :, None] @ memory).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), memory


def chunked_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """The same map, C tokens at a time: one triangular system for each chunk, all at once, then a scan over chunks.

    Call u_t = b_t (v_t - k_t a_t S_{t-1}) what token t writes. From the chunk's first memory S, with c the cumulative
    log decay, S_t = e^{c_t} S + sum_{i<=t} e^{c_t - c_i} k_i^T u_i, so the writes of a chunk solve a unit lower
    triangular system (Yang et al. 2024, section 3.2; with decays, Yang et al. 2025, section 3.3):
        (I + A) U = diag(b) (V - diag(e^c) K S) ,    A_ti = b_t L_ti k_t.k_i  for i < t ,    L_ti = e^{c_t - c_i} .
    With R = (I + A)^-1 it falls into what is known before the memory is, and what waits for it:
        U = R diag(b) V - W S ,    W = R diag(b e^c) K ,    O = diag(e^c) Q S + (Q K^T * L) U ,
        S' = e^{c_C} S + Z^T U ,    Z = diag(e^{c_C - c}) K .
    All but the two lines' products with S is done for every chunk at once; the scan is two products a chunk.

    Arguments and results as in recurrent_delta. T need not be a multiple of the chunk.
    """
    memory = first_memory(k, v, memory)
    o, memory = _ChunkedDelta.apply(q, k, v, step_size, log_decay, memory, short(chunk, k.shape[1]))
    return o.to(v.dtype), memory


class _ChunkedDelta(torch.autograd.Function):
    """chunked_delta with a gradient written by hand: large products and one scan, not a walk along the scan's graph.

    On [M, C, *], chunk by chunk: the chunks of one sequence are B H apart, `rows` below.
    """

    @staticmethod
    def forward(ctx, q, k, v, step_size, log_decay, memory, chunk):
        B, T, H, _ = k.shape
        with torch.autocast(q.device.type, enabled=False):
            q, k, v, b, log_decay = (into_chunks(x, chunk, memory.dtype) for x in (q, k, v, step_size, log_decay))
            fade, start, end = fades(k, log_decay)
            R = unit_inverse(torch.bmm(k, k.mT).mul_(fade).mul_(b))
            W = torch.bmm(R * (b * start).mT, k)
            U = torch.bmm(R * b.mT, v)
            Z = k * end
            (M, rows), whole = (len(k), B * H), start[:, -1:]
            S = k.new_empty(M + rows, *memory.shape[-2:])  # before every chunk, and after the last
            S[:rows] = memory.flatten(0, 1)
            for n in range(0, M, rows):
                here, there = slice(n, n + rows), slice(n + rows, n + 2 * rows)
                U[here].baddbmm_(W[here], S[here], alpha=-1)
                torch.mul(S[here], whole[here], out=S[there]).baddbmm_(Z[here].mT, U[here])
            o = torch.bmm(q, S[:M]).mul_(start).baddbmm_(torch.bmm(q, k.mT).mul_(fade), U)
        ctx.save_for_backward(q, k, v, b, fade, start, end, R, W, U, S)
        ctx.like, ctx.has_decay = (B, T, H), log_decay is not None
        return from_chunks(o, ctx.like), S[M:].clone().unflatten(0, (B, H))

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dmemory):
        """With dX the gradient by X, each line is the transpose of one of chunked_delta's:

        dU = (Q K^T * L)^T dO + Z dS'                         E = R^T dU , the gradient by the system's right-hand side
        dS = (e^c Q)^T dO + e^{c_C} dS' - W^T dU              the scan, now from the last chunk to the first
        dQ = (dO U^T * L) K + e^c dO S^T
        dK = b G + J ,   G = -(E U^T * L) K - e^c E S^T ,
                         J = (dO U^T * L)^T Q - (E U^T * L)^T b K + e^{c_C - c} U dS'^T
        dV = b E ,       db = E . V + G . K                   (row by row; the diagonal of E U^T does not count)
        dc = Q . dQ + K . (b G - J) ,                         plus S' . dS' for the chunk's last c
        The last: e^{c_t} scales whatever token t reads with, its query and its key in G; e^{-c_t} the key it writes
        with, in J. And since c is a sum of log decays, each of these collects dc from its token to the end of the
        chunk.
        """
        q, k, v, b, fade, start, end, R, W, U, S = ctx.saved_tensors
        (M, rows), whole = (len(k), len(S) - len(k)), start[:, -1:]
        with torch.autocast(q.device.type, enabled=False):
            do = into_chunks(do, q.shape[1], q.dtype)
            dU = torch.bmm(torch.bmm(q, k.mT).mul_(fade).mT, do)
            Z, read = k * end, do * start
            dS = torch.empty_like(S)
            torch.bmm(q.mT, read, out=dS[:M])
            dS[M:] = dmemory.flatten(0, 1)
            for n in reversed(range(0, M, rows)):
                here, there = slice(n, n + rows), slice(n + rows, n + 2 * rows)
                dU[here].baddbmm_(Z[here], dS[there])
                dS[here].addcmul_(dS[there], whole[here]).baddbmm_(W[here].mT, dU[here], alpha=-1)
            E = torch.bmm(R.mT, dU)

            dattend = torch.bmm(do, U.mT).mul_(fade)
            dA = torch.bmm(E, U.mT).mul_(fade)
            dA.diagonal(dim1=-2, dim2=-1).zero_()
            dq = torch.bmm(read, S[:M].mT).baddbmm_(dattend, k)
            G = torch.bmm(E, S[:M].mT).mul_(start).baddbmm_(dA, k).neg_()
            J = torch.bmm(U, dS[rows:].mT).mul_(end).baddbmm_(dattend.mT, q).baddbmm_((dA * b).mT, k, alpha=-1)
            db = _dot(E, v).add_(_dot(k, G))
            G.mul_(b)
            dlog_decay = None
            if ctx.has_decay:
                dc = _dot(q, dq) + _dot(k, G - J)
                dc[:, -1] += (S[rows:] * dS[rows:]).sum((-2, -1)).unsqueeze(-1)
                dlog_decay = from_chunks(dc.flip(-2).cumsum(-2).flip(-2), ctx.like).squeeze(-1)
            dk, dv, dmemory = G.add_(J), E.mul_(b), dS[:rows].unflatten(0, ctx.like[::2])
            dq, dk, dv, db = (from_chunks(x, ctx.like) for x in (dq, dk, dv, db))
            return dq, dk, dv, db.squeeze(-1), dlog_decay, dmemory, None


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y).unsqueeze(-1)


class Delta(Memory):
    """The delta rule with a learned step size per head and token: b = sigmoid(x W + c), twice that with negative
    eigenvalues.

    Without a decay it is DeltaNet, with one per head Gated DeltaNet. Keys of unit length keep every step stable; the
    shell normalises them.
    """

    accepts_decay: ClassVar[tuple[str, ...]] = ("none", "head", "signed")
    solver = "a gradient step a token"

    def __init__(
        self, sizes: Sizes, backend: str = "auto", chunk: int | None = None, negative_eigenvalues: bool = False
    ) -> None:
        super().__init__(sizes, backend, chunk)
        self.largest_step = 2.0 if negative_eigenvalues else 1.0
        self.step_size = nn.Linear(sizes.hidden_size, sizes.num_heads)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None = None,
        state: Any = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        step_size = self.largest_step * wide(self.step_size(x)).sigmoid()
        log_decay = forget_at_starts(log_decay, segments, like=step_size)
        backend = self.choose(v.device, v.dtype).backend
        if backend == "recurrent" or k.shape[1] == 1:  # one token is the definition itself, on every backend
            return recurrent_delta(q, k, v, step_size, log_decay, state)
        if backend == "fla":
            return fla.gated_delta(q, k, v, step_size, log_decay, state)
        return chunked_delta(q, k, v, step_size, log_decay, state, self.tokens_at_once(v))

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        return {"fla": fla.refusal_gated_delta(device, dtype, self.key_dim, self.value_dim)}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return fla.route_gated_delta(device) if backend == "fla" else ""

    def flops_per_token(self, seq_len: int) -> int:
        """Three products with the memory (predict, write, read), and the step sizes' projection."""
        return self.num_heads * (6 * self.key_dim * self.value_dim + 2 * self.hidden_size)
