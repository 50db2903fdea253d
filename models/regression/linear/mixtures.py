"""Chunks as mixtures: the parallel form of memories whose gates are one number per head.

Within a chunk everything that such a memory reads, refers to or carries on is a combination of the n matrices that the
chunk begins with (a memory, a momentum, ...) and of what it writes, k_i^T u_i with u_i = v_i - k_i M_ref(i), the errors
at a matrix referred to. The coefficients do not depend on keys and values: a chapter states them (momentum's in
coefficients.py), and one scan does the rest.

Shapes: C chunk, N chunks, M = N B H as in chunks.py, K key width, V value width, W writes of a chunk, n matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.regression.chunks import unit_inverse


class Mixture(NamedTuple):
    """Combinations of a chunk's first matrices and of its writes: for each row states [M, *, n], writes [M, *, W]."""

    states: Tensor
    writes: Tensor


def scan(
    q: Tensor, k: Tensor, v: Tensor, read: Mixture, refer: Mixture, carry: Mixture, matrices: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All chunks, from the n matrices [B, H, K, V] of the state: a triangular system for each, all at once, then three
    products for each, one after the other.

    q [M, C, K]; k [M, W, K] and v [M, W, V].  read [C rows]: the matrices that the queries are put to; of the n, the
    first may do.  refer [W rows]: those that the errors are taken at; their writes lie strictly below the diagonal.
    carry [n rows]: those that the next chunk begins with. Returns o [M, C, V] and the matrices after the last chunk.
    """
    first = torch.stack(matrices, dim=2)
    o, last = _Scan.apply(q, k, v, *read, *refer, *carry, first.flatten(0, 1))
    return o, last.view_as(first).unbind(2)


class _Scan(torch.autograd.Function):
    """Chunks as mixtures, one after another, with a gradient written by hand: large products and two scans.

    With X the n matrices that a chunk begins with, one above the other [n K, V], and c (x) K the rows of K scaled by n
    numbers each and laid side by side, [W, n K]:
        (I + K K^T * refer) U = V - (refer (x) K) X ,     O = (read (x) Q) X + (Q K^T * read) U ,
        X' = carry X + (carry (x) K)^T U .
    """

    @staticmethod
    def forward(ctx, q, k, v, read, read_writes, refer, refer_writes, carry, carry_writes, first):
        (M, K, V), (rows, n) = (len(k), k.shape[-1], v.shape[-1]), first.shape[:2]
        with torch.autocast(q.device.type, enabled=False):
            R = unit_inverse(torch.bmm(k, k.mT).mul_(refer_writes))
            W, Z = torch.bmm(R, spread(k, refer)), spread(k, carry_writes.mT)
            U = torch.bmm(R, v)
            X = k.new_empty(M + rows, n * K, V)  # before every chunk, and after the last
            X[:rows] = first.flatten(1, 2)
            for i in range(0, M, rows):
                here, there = slice(i, i + rows), slice(i + rows, i + 2 * rows)
                U[here].baddbmm_(W[here], X[here], alpha=-1)
                X[there] = _mix(carry[here], X[here])
                X[there].baddbmm_(Z[here].mT, U[here])
            seen = X[:M, : read.shape[-1] * K]
            # not in place: Dynamo of torch 2.11 loses the gradient by an output that was written twice
            o = torch.baddbmm(torch.bmm(spread(q, read), seen), torch.bmm(q, k.mT).mul_(read_writes), U)
        ctx.save_for_backward(q, k, read, read_writes, refer, refer_writes, carry, carry_writes, R, W, U, X)
        return o, X[M:].clone().view_as(first)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlast):
        """With dX the gradient by X, each line is the transpose of one of the forward's; E = R^T dU is the gradient by
        the system's right-hand side.
        """
        q, k, read, read_writes, refer, refer_writes, carry, carry_writes, R, W, U, X = ctx.saved_tensors
        M, rows, width = len(k), len(dlast), read.shape[-1] * k.shape[-1]
        with torch.autocast(q.device.type, enabled=False):
            qk, kk = torch.bmm(q, k.mT), torch.bmm(k, k.mT)
            Z, dU = spread(k, carry_writes.mT), torch.bmm((qk * read_writes).mT, do)
            dX = torch.zeros_like(X)
            torch.bmm(spread(q, read).mT, do, out=dX[:M, :width])
            dX[M:] = dlast.flatten(1, 2)
            for i in reversed(range(0, M, rows)):
                here, there = slice(i, i + rows), slice(i + rows, i + 2 * rows)
                dU[here].baddbmm_(Z[here], dX[there])
                dX[here] += _mix(carry[here].mT, dX[there])
                dX[here].baddbmm_(W[here].mT, dU[here], alpha=-1)
            E = torch.bmm(R.mT, dU)

            dattend, dsystem = torch.bmm(do, U.mT), torch.bmm(E, U.mT).neg_()
            dread_writes, drefer_writes = dattend * qk, dsystem * kk
            dattend.mul_(read_writes)
            dsystem.mul_(refer_writes)
            dq, dread = _gather(torch.bmm(do, X[:M, :width].mT), q, read)
            dk, drefer = _gather(torch.bmm(E, X[:M].mT).neg_(), k, refer)
            dkey, dcarry_writes = _gather(torch.bmm(U, dX[rows:].mT), k, carry_writes.mT)
            dq.baddbmm_(dattend, k)
            dk.add_(dkey).baddbmm_(dattend.mT, q).baddbmm_(dsystem + dsystem.mT, k)
            n = carry.shape[-1]
            dstates, states = (x.unflatten(1, (n, -1)).flatten(2) for x in (dX[rows:], X[:M]))
            dcarry = torch.bmm(dstates, states.mT)
            dfirst = dX[:rows].unflatten(1, (n, -1))
        return dq, dk, E, dread, dread_writes, drefer, drefer_writes, dcarry, dcarry_writes.mT, dfirst


def spread(x: Tensor, c: Tensor) -> Tensor:
    """c (x) x: rows of x [M, W, K] times each of their n numbers c [M, W, n], side by side: [M, W, n K]."""
    return (c.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


def _gather(gradient: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by x and by c from the one by spread(x, c)."""
    gradient = gradient.unflatten(-1, (c.shape[-1], -1))
    return (gradient * c.unsqueeze(-1)).sum(-2), (gradient @ x.unsqueeze(-1)).squeeze(-1)


def _mix(c: Tensor, X: Tensor) -> Tensor:
    """The n matrices X, one above the other [rows, n K, V], combined by c [rows, n, n]."""
    return torch.bmm(c, X.unflatten(1, (c.shape[-1], -1)).flatten(2)).view_as(X)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of [*, n, m] and [*, m, p] with the same *, in their own precision whatever autocast says in the backward
    pass. A compiled one is traced where the forward pass is, and autocast off.
    """
    return x @ y if torch.compiler.is_compiling() else _Product.apply(x, y)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x @ y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            dx = gradient @ y.mT if ctx.needs_input_grad[0] else None
            return dx, x.mT @ gradient if ctx.needs_input_grad[1] else None
