"""Test-time training: a memory with a layer norm, linear or with a hidden layer, trained in mini-batches.

Problem.    An inner model with a residual and a layer norm,
                f(x) = x + LN(z(x)) ,    z(x) = x W + b    or    z(x) = gelu(x W_1 + b_1) W_2 + b_2 ,
            is fitted online to the pairs by gradient descent on
                l_j(W) = 1/2 ||v_j - f(k_j; W)||^2 .
Solution.   The tokens of a document fall into mini-batches of b. All of one take their gradients at the weights W that
            the mini-batch begins with, and token t, the p-th of its mini-batch, reads the weights
                W_t = W - c_p sum_{j<=t} eta_j grad l_j(W) ,    o_t = f(q_t; W_t) ,
            with the sum over its own mini-batch. The next one begins with the last W_t, a document with learned W_0.
            c_p = max(1/p + learned, 0) turns the sum into an average and belongs to the token that reads; eta_j =
            sigmoid(x_j w + bias) base_lr / K belongs to the one that writes. So every token weighs the whole mini-batch
            anew: no decay does that. (TTT-Linear and TTT-MLP, Sun et al. 2024, sections 2.4 to 2.7; GELU by tanh.)
Dual form.  Gradients at the same weights are known together. For a layer z = x W + b with inputs X and dl/dz = E,
            x_t W_t + b_t = x_t W + b - c_p sum_{j<=t} eta_j (x_t.x_j + 1) E_j: products of b x b, layer by layer, and
            no matrix per token (section 2.5).
Calls.      A call may end inside a mini-batch: the state has its first weights and its tokens so far, which the next
            call puts before its own, so that any split into calls computes the same products.
Exactness.  The dual form equals the recurrence up to rounding, gradients included: those through the inner gradients
            too, that is second derivatives of LN and GELU.
Others.     fla 0.6.0's ttt kernels are not among the backends. They read z(q) + LN(z(q)) for q + LN(z(q)), take eta of
            the token that reads, so that none can say how much it writes, and have no hidden layer.

Shapes: B batch, T tokens, H heads, K key width, which is V, F hidden width, b tokens of a mini-batch, N mini-batches,
M = B H rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.kernels import ttt as triton_ttt
from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.chunks import from_chunks, into_chunks
from models.regression.deep.ttt.inner_model import Norm, Weights, apply, gelu, gradients, layers
from models.regression.deep.ttt.mini_batches import MiniBatches, mini_batches
from models.regression.linear.mixtures import product
from models.regression.regressor import Regressor, Tokens

HIDDEN = 4  # F / K
BASE_LR = {"linear": 1.0, "mlp": 0.1}


class State(NamedTuple):
    """weights: those that the present mini-batch begins with, [B, H, *, *]. keys, values [B, b - 1, H, K] and steps
    [B, b - 1, H]: its tokens so far, the newest last, zero where there are fewer. phase [B]: how many there are.
    """

    weights: Weights
    keys: Tensor
    values: Tensor
    steps: Tensor
    phase: Tensor


# The forms


def recurrent_ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    token_size: Tensor,
    start: Weights,
    norm: Norm,
    state: State | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The definition, one token at a time.

    q, k, v: [B, T, H, K].  step_size: [B, T, H], eta above.  token_size: [b], c above.  start: W_0, [H, *, *] each.
    norm: of the inner model.  state: None for W_0.  segments: [B, T], documents.
    Returns o [B, T, H, K] in the dtype of v, and the state after the last token. Computed in float32 at least.
    """
    call = _enter(q, k, v, step_size, token_size, state, segments)
    start, norm, weights = _of_rows(start, norm, state, call)
    batch, place = call.batches.places(call.q.shape[1])
    H, b, outputs = k.shape[2], len(token_size), []

    def where(condition: Tensor, x: Weights, y: Weights) -> Weights:
        """x in the rows of a condition [B], else y."""
        rows = condition.repeat_interleave(H).view(-1, 1, 1)
        return tuple(torch.where(rows, s, t) for s, t in zip(x, y, strict=True))

    with torch.autocast(q.device.type, enabled=False):
        zeros = total = tuple(torch.zeros_like(w) for w in weights)
        for t in range(call.q.shape[1]):
            eta = call.steps[:, t].masked_fill(place[:, t : t + 1] < 0, 0.0).view(-1, 1, 1)
            query, key, value = (x[:, t].to(eta.dtype).flatten(0, 1).unsqueeze(1) for x in (call.q, call.k, call.v))
            if call.batches.fresh is not None:
                begins = (place[:, t] == 0) & call.batches.fresh.gather(1, batch[:, t : t + 1]).squeeze(1)
                weights, total = where(begins, start, weights), where(begins, zeros, total)
            pairs = gradients(key, value, weights, norm)
            written = [g for x, e in pairs for g in (product(x.mT, eta * e), eta * e)]
            total = tuple(s + g for s, g in zip(total, written, strict=True))
            c = call.token_size[place[:, t].clamp(min=0)].repeat_interleave(H).view(-1, 1, 1)
            moved = tuple(w - c * s for w, s in zip(weights, total, strict=True))
            outputs.append((query + norm(apply(query, moved))).view(-1, H, query.shape[-1]))
            ends = place[:, t] == b - 1
            weights, total = where(ends, moved, weights), where(ends, zeros, total)
    return _leave(torch.stack(outputs, dim=1), weights, call, v.dtype)


@torch.compiler.disable  # a loop over all mini-batches: unrolled it is a graph of thousands of products
def dual_ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    token_size: Tensor,
    start: Weights,
    norm: Norm,
    state: State | None = None,
    segments: Tensor | None = None,
    remat: int | None = None,
) -> tuple[Tensor, State]:
    """The same map, a mini-batch at a time. Arguments and results as in recurrent_ttt.

    remat: how many mini-batches are computed again, together, in the backward pass, which then keeps only the weights
    between such groups; None keeps all: of a mini-batch its weights and some ten times its activations.
    """
    call = _enter(q, k, v, step_size, token_size, state, segments)
    start, norm, weights = _of_rows(start, norm, state, call)
    (B, L, H), b, batches = call.k.shape[:3], len(token_size), call.batches
    aligned = segments is None and state is None
    pairs, steps, dtype = (call.q, call.k, call.v), call.steps, call.steps.dtype
    with torch.autocast(q.device.type, enabled=False):
        if not aligned:
            pairs, steps = map(batches.gather, pairs), batches.gather(steps) * batches.real.unsqueeze(-1)
        Q, K, V, steps = (into_chunks(x, b, dtype).unflatten(0, (-1, B * H)) for x in (*pairs, steps))  # [N, M, b, *]
        reads = (call.token_size.unsqueeze(1) * steps.mT).tril()  # c_p eta_j of t >= j
        complete, fresh = (
            None if x is None else x.T.repeat_interleave(H, 1)[..., None, None]
            for x in (batches.complete, batches.fresh)
        )
        ends = call.token_size[-1] * steps * complete  # what a mini-batch writes, if it is over
        outputs = []
        for a in range(0, len(Q), remat or len(Q)):
            group = [None if x is None else x[a : a + (remat or len(Q))] for x in (Q, K, V, reads, ends, fresh)]
            if remat is None or not torch.is_grad_enabled():
                z, weights = _mini_batch_steps(*group, weights, start, norm)
            else:
                given = (*group, weights, start, norm)
                z, weights = checkpoint(_mini_batch_steps, *given, use_reentrant=False, preserve_rng_state=False)
            outputs.append(z)
        o = from_chunks((Q + norm(torch.cat(outputs))).flatten(0, 1), (B, len(Q) * b, H))
        o = o[:, :L] if aligned else batches.scatter(o, L)
    return _leave(o, weights, call, v.dtype)


def kernel_ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    token_size: Tensor,
    start: Weights,
    norm: Norm,
    state: State | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The same map by our Triton kernels. Arguments and results as in recurrent_ttt."""
    call = _enter(q, k, v, step_size, token_size, state, segments, counted=False)
    sizes = [w.shape[1:] for w in start]
    learned = torch.cat([w.flatten(1) for w in start], dim=1)
    first = learned.expand(len(k), -1, -1)
    if state is not None:
        first = torch.cat([w.flatten(2) for w in state.weights], dim=2)
    given = (call.q, call.k, call.v, call.steps, call.token_size, learned, first, *norm, *call.batches[:2])
    o, last = triton_ttt.scan(*given)
    parts = last.flatten(0, 1).split([size.numel() for size in sizes], dim=1)
    return _leave(o, tuple(x.unflatten(1, size) for x, size in zip(parts, sizes, strict=True)), call, v.dtype)


def _mini_batch_steps(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    reads: Tensor,
    ends: Tensor,
    fresh: Tensor | None,
    weights: Weights,
    start: Weights,
    norm: Norm,
) -> tuple[Tensor, Weights]:
    """Some mini-batches, one after the other: z of their queries [N, M, b, V], and the weights after them."""
    outputs = []
    each = zip(*(x.unbind() for x in (Q, K, V, reads, ends)), strict=True)  # the gradient of x[n] is as large as x
    for n, (x, key, value, read, end) in enumerate(each):
        if fresh is not None:
            weights = tuple(torch.where(fresh[n], s, w) for s, w in zip(start, weights, strict=True))
        pairs, moved = gradients(key, value, weights, norm), []
        for i, ((W, b), (X, E)) in enumerate(zip(layers(weights), pairs, strict=True)):
            x = gelu(x) if i else x
            x = product(x, W) + b - product(read * (product(x, X.mT) + 1), E)
            written = end * E
            moved += [W - product(X.mT, written), b - written.sum(1, keepdim=True)]
        weights = tuple(moved)
        outputs.append(x)
    return torch.stack(outputs), weights


class _Call(NamedTuple):
    """What the forms compute with: q, k, v [B, L, H, K] and steps [B, L, H] with the tokens kept from the call before
    in front, all but q, k, v in the working dtype.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    steps: Tensor
    token_size: Tensor
    batches: MiniBatches
    kept: int


def _enter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    token_size: Tensor,
    state: State | None,
    segments: Tensor | None,
    counted: bool = True,
) -> _Call:
    dtype, kept, phase = working_dtype(q, k, v), 0, None
    step_size, token_size = step_size.to(dtype), token_size.to(dtype)
    if state is not None:
        phase, kept = state.phase, len(token_size) - 1
        q = F.pad(q, (0, 0, 0, 0, kept, 0))
        k, v, step_size = (
            torch.cat([x.to(y.dtype), y], dim=1) for x, y in zip(state[1:4], (k, v, step_size), strict=True)
        )
    batches = mini_batches(k, len(token_size), kept, phase, segments, counted)
    return _Call(q, k, v, step_size, token_size, batches, kept)


def _of_rows(start: Weights, norm: Norm, state: State | None, call: _Call) -> tuple[Weights, Norm, Weights]:
    """W_0, the layer norm and the weights that the call begins with, for each of the M rows, in the working dtype."""
    B, dtype = len(call.k), call.steps.dtype
    start = tuple(w.to(dtype).repeat(B, 1, 1) for w in start)
    norm = Norm(*(x.to(dtype).repeat(B, 1).unsqueeze(1) for x in norm))
    return start, norm, start if state is None else tuple(w.to(dtype).flatten(0, 1) for w in state.weights)


def _leave(o: Tensor, weights: Weights, call: _Call, dtype: torch.dtype) -> tuple[Tensor, State]:
    """o [B, L, H, V] without the tokens kept from the call before, and what the next call needs."""
    (B, L), kept = call.k.shape[:2], len(call.token_size) - 1
    phase = call.batches.phase(L)
    lasting = torch.arange(kept, device=phase.device) >= kept - phase.unsqueeze(1)
    pending = []
    for x in (call.k, call.v, call.steps):
        x = F.pad(x, (*(0, 0) * (x.ndim - 2), max(kept - L, 0), 0))[:, max(L - kept, 0) :]
        pending.append(x.masked_fill(~lasting.view(B, kept, *[1] * (x.ndim - 2)), 0.0))
    weights = tuple(w.unflatten(0, (B, -1)) for w in weights)
    return o[:, call.kept :].to(dtype), State(weights, *pending, phase)


class TTT(Regressor):
    """The test-time-training layers' memory, with learned W_0, gamma and beta per head, learned c shared by all heads,
    and a learned step size per head and token.

    inner_model: linear | mlp, with a hidden layer of 4 K.
    grad_batch: b, the tokens of a mini-batch.
    base_lr: the step size where its gate is open, times K; null for the paper's, 1 (linear) and 0.1 (mlp).
    remat: mini-batches that the PyTorch form computes again, together, in the backward pass, to keep less; null: none.
    """

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        inner_model: str = "linear",
        grad_batch: int = 16,
        base_lr: float | None = None,
        remat: int | None = None,
    ) -> None:
        super().__init__(sizes, backend)
        H, K = sizes.num_heads, sizes.key_dim
        if inner_model not in BASE_LR:
            raise ValueError(f"regressor.inner_model={inner_model} is not one of {', '.join(BASE_LR)}")
        if sizes.value_dim != K:
            raise ValueError(
                f"value_dim={sizes.value_dim}: the inner model adds to its input, so values are as wide as keys "
                f"(after the feature map); only value_dim={K} is possible"
            )
        if grad_batch < 1:
            raise ValueError(f"regressor.grad_batch={grad_batch} is no number of tokens; a positive integer")
        if base_lr is not None and base_lr <= 0:
            raise ValueError(f"regressor.base_lr={base_lr} must be positive, or null for the paper's")
        if remat is not None and remat < 1:
            raise ValueError(f"regressor.remat={remat} is no number of mini-batches; a positive integer, or null")
        self.inner_model, self.grad_batch, self.remat = inner_model, grad_batch, remat
        self.base_lr = BASE_LR[inner_model] if base_lr is None else base_lr
        self.function_class = {"linear": "linear, layer norm", "mlp": "MLP, layer norm"}[inner_model]
        self.fit = f"gradient steps, mini-batches of {grad_batch}"
        widths = (K, K) if inner_model == "linear" else (K, HIDDEN * K, K)
        self.shapes = list(pairwise(widths))
        start = [w for a, b in self.shapes for w in (0.02 * torch.randn(H, a, b), torch.zeros(H, 1, b))]
        self.start = nn.ParameterList(start)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(H, K)), nn.Parameter(torch.zeros(H, K))
        self.token_offset = nn.Parameter(torch.zeros(grad_batch))
        self.step_size = nn.Linear(sizes.hidden_size, H)

    def steps(self, x: Tensor) -> Tensor:
        """eta [B, T, H]."""
        return wide(self.step_size(x)).sigmoid() * (self.base_lr / self.key_dim)

    def token_size(self) -> Tensor:
        """c [b]."""
        count = torch.arange(1, self.grad_batch + 1, device=self.token_offset.device)
        return (1 / count + wide(self.token_offset)).clamp(min=0.0)

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, _, segments = tokens
        norm = Norm(self.norm_weight, self.norm_bias)
        given = (q, k, v, self.steps(x), self.token_size(), tuple(self.start), norm, state, segments)
        backend = self.choose(v.device, v.dtype).backend
        if backend == "recurrent":
            return recurrent_ttt(*given)
        if backend == "triton":
            return kernel_ttt(*given)
        return dual_ttt(*given, self.remat)

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        given = (device, dtype, self.inner_model, self.key_dim, self.grad_batch)
        return {"triton": triton_ttt.refusal(*given)}

    def forget(self, state: State, rows: Tensor) -> State:
        """The given rows back at the learned start, without tokens."""
        row = rows.view(-1, 1, 1, 1)
        weights = tuple(torch.where(row, s.to(w), w) for s, w in zip(self.start, state.weights, strict=True))
        kept = (x.masked_fill(row if x.ndim == 4 else row.squeeze(-1), 0.0) for x in state[1:4])
        return State(weights, *kept, state.phase.masked_fill(rows, 0))

    def flops_per_token(self, seq_len: int) -> int:
        """Of every layer three products (predict, write, read), of all but the first the error sent back through it,
        and the step sizes' projection.
        """
        sizes = [a * b for a, b in self.shapes]
        return self.num_heads * (6 * sum(sizes) + 2 * sum(sizes[1:]) + 2 * self.hidden_size)

    def state_size(self, seq_len: int) -> int:
        """The weights, and the tokens of a mini-batch but the last: keys, values and step sizes."""
        return self.num_heads * (
            sum((a + 1) * b for a, b in self.shapes) + (self.grad_batch - 1) * (2 * self.key_dim + 1)
        )
