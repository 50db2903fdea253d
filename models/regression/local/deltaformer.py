"""DeltaFormer: softmax attention over values that are corrected before they are stored.

Problem.    The delta rule (models/regression/linear/delta.py) for a memory that is attention: what it already says at a
            new key is taken from the new value. The memory is the pairs (k_j, u_j) and reads a weighted mean of them,
                m_t(x) = sum_{j<=t} p_j(x) u_j ,    p_j(x) = exp(beta x . k_j) / sum_i exp(beta x . k_i) .
Solution.   u_t = v_t - b_t m_{t-1}(k_t) ,    o_t = m_t(q_t) ,
            m_0 = 0 and b_t = sigmoid(x_t W + c) per head. With b = 0 it is softmax. Its sibling kernel.py takes from
            every value what all others explain of it, and needs the inverse of the kernel matrix; here it is the ones
            before, and the system is triangular: for a document, with P the weights p_j(k_t), j < t,
                (I + diag(b) P) U = V .
Source.     Zhong, Xu, Ao and Shi 2025 (arXiv 2505.19488), by the feature map of the softmax kernel; fla 0.6.0,
            ops/deltaformer. fla's operator looks up at q_t, though its layer's text says that keys are compared with
            keys; here it is k_t, so that what is stored does not hang on how it is read. fla's layer has no sigmoid
            around b.
State.      The keys, and u for the values: it grows with the sequence.
Exactness.  Exact, and linear in memory: the system is solved block by block, and no T x T is kept for the gradient.

Shapes: as in pairs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.kernels.backend import compiles
from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.local.constant import Softmax, of_heads
from models.regression.local.pairs import Pairs, View, by_head
from models.regression.regressor import Tokens


def past_weights(visible: Tensor, k: Tensor, keys: Tensor, beta: Tensor) -> Tensor:
    """p(k) of the pairs before each token, [B, H, T, S]; a row of zeros where there is none.

    k [B, H, T, K] of the tokens, keys [B, H, S, K] of all pairs, visible [B or 1, 1, T, S], beta [H, 1, 1].
    """
    logits = (beta * (k @ keys.mT)).masked_fill(~visible, -torch.inf)
    some = visible.any(-1, keepdim=True)
    return logits.masked_fill(~some, 0.0).softmax(-1).masked_fill(~some, 0.0)


def recurrent_corrected(k: Tensor, v: Tensor, b: Tensor, beta: Tensor, view: View, past: Pairs) -> Tensor:
    """The definition, one token at a time: u [B, H, T, V].

    k [B, H, T, K], v [B, H, T, V], b [B, H, T, 1], beta [H, 1, 1]; view: which pairs a token may use, itself among
    them; past: keys and u of the tokens before, [B, H, S, *].
    """
    keys, values, S = torch.cat([past.k, k], dim=2), past.v, past.k.shape[2]
    for t in range(k.shape[2]):
        now, seen = slice(t, t + 1), slice(0, S + t)
        visible = view.visible(now, seen, k.device).unsqueeze(1)
        known = past_weights(visible, k[:, :, now], keys[:, :, seen], beta) @ values
        values = torch.cat([values, v[:, :, now] - b[:, :, now] * known], dim=2)
    return values[:, :, S:]


@torch.compiler.disable  # it compiles its own step: a compiler would write out all blocks, each as wide as what it sees
def parallel_corrected(
    k: Tensor, v: Tensor, b: Tensor, beta: Tensor, view: View, past: Pairs, block: int = 64, compiled: bool = False
) -> Tensor:
    """The same for `block` tokens at a time, by a triangular system for each. compiled: whole blocks by torch.compile,
    in one form for all numbers of pairs. Other arguments and result as in recurrent_corrected."""
    return _Corrected.apply(torch.cat([past.k, k], dim=2), v, b, beta, past.v, view, block, compiled)


class _Corrected(torch.autograd.Function):
    """Blocks in turn, with a gradient that goes through them backwards and makes their weights anew: no T x T outlives
    its block."""

    @staticmethod
    def forward(
        ctx, keys: Tensor, v: Tensor, b: Tensor, beta: Tensor, before: Tensor, view: View, block: int, compiled: bool
    ) -> Tensor:
        # one row more, so that no part of them is the whole: else the compiler makes another form of the last block
        keys, u = F.pad(keys, (0, 0, 0, 1)), F.pad(before, (0, 0, 0, v.shape[2] + 1))
        for tokens, here, seen in _spans(v.shape[2], view.past, block):
            known = _before(view, tokens, here, seen, u.device), keys[:, :, seen], u[:, :, seen]
            whole = compiled and seen.stop > here.stop - here.start == block
            u[:, :, here] = _solved(corrected_block, whole, *known, v[:, :, tokens], b[:, :, tokens], beta)
        ctx.save_for_backward(keys, b, beta, u)
        ctx.settings = view, block, compiled
        return u[:, :, view.past : -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, du: Tensor) -> tuple[Tensor | None, ...]:
        keys, b, beta, u = ctx.saved_tensors
        view, block, compiled = ctx.settings
        S = view.past
        d_values, dv = torch.cat([torch.zeros_like(u[:, :, :S]), du], dim=2), torch.empty_like(du)
        d_keys, db, d_beta = torch.zeros_like(keys[:, :, :-1]), torch.empty_like(b), torch.zeros_like(beta)
        for tokens, here, seen in reversed(_spans(du.shape[2], S, block)):
            known = _before(view, tokens, here, seen, u.device), keys[:, :, seen], u[:, :, seen]
            whole = compiled and seen.stop > here.stop - here.start == block
            found = _solved(block_gradient, whole, *known, d_values[:, :, here], b[:, :, tokens], beta)
            dv[:, :, tokens], db[:, :, tokens] = found[:2]
            d_beta += found[2]
            d_values[:, :, seen] -= found[3]  # at the block itself, where nobody reads it any more, too
            d_keys[:, :, here] += found[4]
            d_keys[:, :, seen] += found[5]
        return d_keys, dv, db, d_beta, d_values[:, :, :S], None, None, None


def corrected_block(visible: Tensor, keys: Tensor, u: Tensor, v: Tensor, b: Tensor, beta: Tensor) -> Tensor:
    """u of the C tokens whose keys are the last ones: (I + diag(b) P) u = v - diag(b) P u_before.

    visible [B or 1, 1, C, S], keys [B, H, S, K], u [B, H, S, V] of all pairs up to them, zero for their own, v [B, H,
    C, V], b [B, H, C, 1], beta [H, 1, 1].
    """
    C = v.shape[2]
    P = b * past_weights(visible, keys[:, :, -C:], keys, beta)
    return torch.linalg.solve_triangular(P[..., -C:], v - P @ u, upper=False, unitriangular=True)


def block_gradient(
    visible: Tensor, keys: Tensor, u: Tensor, du: Tensor, b: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of corrected_block from du [B, H, C, V]: by v, b and beta; by u of the tokens before, negated; by
    the C keys as those that look up, and by all S as those that are compared with. u: the solution too. With the rows
    B P of a block and D its triangle,
        G = D^-T dU ,   dv = G ,   dU_before -= (B P)^T G ,   dP = -(b G) u^T ,   db = -G . (P u) .
    """
    C = du.shape[2]
    here = keys[:, :, -C:]
    p = past_weights(visible, here, keys, beta)
    G = torch.linalg.solve_triangular((b * p[..., -C:]).mT, du, upper=True, unitriangular=True)
    db = -(G * (p @ u)).sum(-1, keepdim=True)
    dp = -(b * G) @ u.mT
    d_logits = p * (dp - (p * dp).sum(-1, keepdim=True))
    d_here = d_logits @ keys
    d_beta = (d_here * here).sum((0, 2, 3)).view_as(beta)
    return G, db, d_beta, (b * p).mT @ G, beta * d_here, beta * (d_logits.mT @ here)


@cache
def _compiled(form: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Any]:
    return torch.compile(form)


def _solved(form: Callable[..., Any], compiled: bool, visible: Tensor, keys: Tensor, u: Tensor, *rest: Tensor) -> Any:
    """form(visible, keys, u, *rest). A compiler is told that each block sees another number of pairs."""
    if not compiled:
        return form(visible, keys, u, *rest)
    for x, pairs in ((visible, 3), (keys, 2), (u, 2)):
        torch._dynamo.maybe_mark_dynamic(x, pairs)
    return _compiled(form)(visible, keys, u, *rest)


def _spans(T: int, past: int, block: int) -> list[tuple[slice, slice, slice]]:
    """Of every block its tokens, their pairs, and all pairs up to the last of them."""
    bounds = [(a, min(a + block, T)) for a in range(0, T, block)]
    return [(slice(a, z), slice(past + a, past + z), slice(0, past + z)) for a, z in bounds]


def _before(view: View, tokens: slice, here: slice, seen: slice, device: torch.device) -> Tensor:
    """Which pairs a token is corrected by, [B or 1, 1, C, S]: those that it may use, but for its own."""
    index = torch.arange(seen.stop, device=device)
    return (view.visible(tokens, seen, device) & (index < index[here, None])).unsqueeze(1)


class DeltaFormer(Softmax):
    """Softmax over corrected values, with a learned share b of the correction per head and token."""

    grouped_heads: ClassVar[bool] = False

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        inverse_temperature: str | float = "learned",
        block: int | None = None,
    ) -> None:
        super().__init__(sizes, backend, "gaussian", inverse_temperature, None, block)
        self.fit = "closed form, values corrected"
        self.step_size = nn.Linear(sizes.hidden_size, sizes.num_heads)

    def forward(self, tokens: Tokens, state: Pairs | None = None) -> tuple[Tensor, Pairs]:
        pairs, view = self.gather(tokens, state)
        S, dtype = view.past, working_dtype(pairs.k, pairs.v)
        k, v = (by_head(x, self.num_heads, dtype) for x in pairs[:2])
        b = self.steps(tokens.x).to(dtype).transpose(1, 2).unsqueeze(-1)
        recurrent = self.choose(tokens.q.device, tokens.q.dtype).backend == "recurrent"
        block = self.queries_at_once(k)
        form: Any = recurrent_corrected
        if not recurrent:
            # not of prompts: a form is for one length of the sequence, by whose strides a block finds its pairs
            compiled = torch.is_grad_enabled() and compiles(k.device)
            form = partial(parallel_corrected, block=block, compiled=compiled)
        with torch.autocast(k.device.type, enabled=False):
            beta = of_heads(self.beta(k))
            u = form(k[:, :, S:], v[:, :, S:], b, beta, view, Pairs(k[:, :, :S], v[:, :, :S]))
        pairs = pairs._replace(v=torch.cat([pairs.v[:, :S], u.transpose(1, 2).to(pairs.v.dtype)], dim=1))
        return self.read(tokens.q, pairs, view), self.keep(pairs, view)

    def steps(self, x: Tensor) -> Tensor:
        """b [B, T, H]."""
        return wide(self.step_size(x)).sigmoid()

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        return super().describe(tokens) | {"step_size": self.steps(tokens.x)}

    def flops_per_token(self, seq_len: int) -> int:
        """Softmax, the same once more over the pairs before each token, and the shares' projection."""
        before = self.num_visible(seq_len) - seq_len
        corrections = 2 * (self.key_dim + self.value_dim) * before // seq_len
        return super().flops_per_token(seq_len) + self.num_heads * (corrections + 2 * self.hidden_size)
