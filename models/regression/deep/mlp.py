"""Deep memories: an MLP that learns within the sequence.

Problem.    momentum.py's, gradient descent with momentum and weight decay on l_t(M) = 1/2 ||v_t - f_M(k_t)||^2 or
            another loss, for an f that is a network of weights M = (W_1, ..., W_L) (network.py).
Solution.   For every weight, with S its momentum and one eta, theta and a per head and token,
                S_t = eta_t S_{t-1} - theta_t dl_t/dM (R_t) ,    M_t = W + a_t (M_{t-1} - W) + S_t ,
                o_t = f(q_t) with the weights M_t .
            (Titans, Behrouz et al. 2025, equations 13 to 15.) The tokens of a document fall into mini-batches of b =
            `grad_batch`, and all of one take their gradients at the memory after the previous one, R (equation 16; the
            paper's t - mod(t, b) would show a mini-batch's last token its own write). Every document begins with M =
            M_0, learned for each head, and S = 0.
Forgetting. W = M_0, `forget_to: start`: what fades is what the sequence has taught. W = 0, `forget_to: zero`, is the
            paper's: the features of the start fade as well, and with them, since W_2 learns in proportion to what W_1
            lets through and W_1 to W_2, all that a network of two layers can learn. For a matrix that starts at zero
            the two are one.
Mini-batch. Another b is another model, and a model is best with the one that it was trained with (TNT, Li et al. 2025):
            b is no choice of speed. It is what makes the layer parallel, though: no form of the rule with b = 1 is.
Stability.  Momentum sums a constant gradient to theta / (1 - eta) of it, so theta = (1 - eta) theta' / b; the gates are
            not tied as momentum.py's are. network.py's limit holds the step of a token to what a
            matrix with keys of length one would make of it. Nothing diverges then, whatever the gates; with three
            layers and more, b = 1 and theta' = 1, reads have been seen to overshoot fifteenfold for a while.
Exactness.  The dual form equals the recurrence up to rounding, whatever the chunk, gradients included.
Others.     titans-pytorch sums the gradients of a chunk, with gates pooled over it, at weights that it holds for every
            chunk; by default all at M_0, so that no gradient of chunk 3 knows of chunk 1. fla 0.6.0 has no deep memory.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks, rows = B H, in and out of a layer.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import deep as kernels
from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.chunks import from_chunks, into_chunks, short
from models.regression.deep import batches, chunks
from models.regression.deep.chunks import Chunk, Fitted, Start, State, Weights, advance, stack, unstack
from models.regression.deep.documents import kernel_deep
from models.regression.deep.network import ACTIVATIONS, LOSSES, Network
from models.regression.deep.optimizers import INNER_OPTIMIZERS
from models.regression.deep.slots import in_turn, lay_out, positions, scan
from models.regression.linear.coefficients import of_gates
from models.regression.linear.momentum import Momentum
from models.regression.regressor import Tokens

OPTIMIZERS = ("momentum", "sgd", *INNER_OPTIMIZERS)
FORGET_TO = ("start", "zero")

AT_ONCE = 4  # chunks of one compiled call, which takes as long to begin as several small kernels take


def recurrent_deep(
    network: Network,
    start: Start,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None = None,
    state: State | None = None,
    grad_batch: int = 64,
    segments: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The definition, one token at a time.

    q, k: [B, T, H, K].  v: [B, T, H, V].  step_size: [B, T, H], theta above.  log_momentum and log_decay: [B, T, H],
    natural logs of eta and a, <= 0; None for eta = 0, without a momentum in the state, and for a = 1.  segments:
    [B, T], documents.  Returns o [B, T, H, V] in the dtype of v, and the state after the last token. Computed in
    float32 at least.
    """
    dtype, outputs = working_dtype(q, k, v), []
    position, begins = positions(k, None if state is None else state.phase, segments)
    opens = position % grad_batch == 0
    M, S, R, _ = start.state(state, len(q), dtype, log_momentum is not None)
    first = [x.to(dtype) for x in start.weights]
    base = [torch.zeros_like(x) if start.fades else x for x in first]
    norm = [x.to(dtype) for x in start.norm]
    with torch.autocast(q.device.type, enabled=False):
        query, key, value = (x.to(dtype).unsqueeze(-2) for x in (q, k, v))
        gates = (None if x is None else x.to(dtype)[..., None, None] for x in (step_size, log_momentum, log_decay))
        theta, log_eta, log_a = gates
        for t in range(q.shape[1]):
            if segments is not None:
                M = [torch.where(begins[:, t].view(-1, 1, 1, 1), w, m) for w, m in zip(first, M, strict=True)]
                S = [s.masked_fill(begins[:, t].view(-1, 1, 1, 1), 0.0) for s in S]
            R = [torch.where(opens[:, t].view(-1, 1, 1, 1), m, r) for m, r in zip(M, R, strict=True)]
            inputs, errors = network.errors(R, key[:, t], value[:, t], norm)
            writes = [theta[:, t] * (x.mT @ e) for x, e in zip(inputs, errors, strict=True)]
            if S:
                S = writes = [log_eta[:, t].exp() * s + write for s, write in zip(S, writes, strict=True)]
            if log_a is not None:
                M = [w + log_a[:, t].exp() * (m - w) for w, m in zip(base, M, strict=True)]
            M = [m + write for m, write in zip(M, writes, strict=True)]
            outputs.append(network.read([partial(torch.matmul, other=m) for m in M], query[:, t], norm))
        o = torch.stack(outputs, dim=1).squeeze(-2).to(v.dtype)
    return o, State(tuple(M), tuple(S), tuple(R), (position[:, -1] + 1) % grad_batch)


@torch.compiler.disable  # it compiles its own step; and how many slots documents fill depends on the data
def chunked_deep(
    network: Network,
    start: Start,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_momentum: Tensor | None,
    log_decay: Tensor | None = None,
    state: State | None = None,
    grad_batch: int = 64,
    segments: Tensor | None = None,
    chunk: int = 64,
    remat: int = 0,
    compiled: bool = False,
) -> tuple[Tensor, State]:
    """The same map, a mini-batch at a time, or C tokens of one: the dual form. No weights exist but at its ends.

    All writes of a chunk are taken at R, so X_l and E_l are known at once. As in chunked_momentum, with N = M - W what
    fades, every N_t is a combination of the chunk's first N_0 and S_0 and of its writes, and so, W apart, is what layer
    l makes of its input y,
        N_t = A_t N_0 + f_t S_0 + sum_{i<=t} G_ti X_i^T E_i ,
        z   = y W + diag(A) y N_0 + diag(f) y S_0 + ((y X^T) * G) E .
    A few products of batches of small matrices for every layer, in the dtype of q, k and v; coefficients and weights
    are float32 at least.

    remat: as in slots.scan. compiled: by torch.compile, once for all chunks. The other arguments and the results as in
    recurrent_deep. T need not be a multiple of anything.
    """
    (B, T, H), dtype = k.shape[:3], working_dtype(q, k, v)
    size = min(short(chunk, T), grad_batch)
    size = -(-grad_batch // -(-grad_batch // size)) if size < grad_batch and size < T else size
    slots = lay_out(k, size, grad_batch, None if state is None else state.phase, segments)
    products = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    with torch.autocast(q.device.type, enabled=False):
        pairs = [into_chunks(slots.fill(x), size, products) for x in (q, k, v)]
        given = (torch.ones_like(step_size), step_size, log_momentum, log_decay)
        read, carry = of_gates(*(None if x is None else into_chunks(slots.fill(x), size, dtype) for x in given))
        columns = (x.unflatten(0, (slots.count, B * H)).unbind() for x in (*pairs, *read, *carry))
        each = [Chunk(*x) for x in zip(*columns, strict=True)]
        rows, state = start.rows(B, dtype), start.state(state, B, dtype, log_momentum is not None)
        M, S, R = ([x.flatten(0, 1) for x in part] for part in state[:3])
        steps = chunks.compiled(network) if compiled else partial(in_turn, partial(advance, network))
        flags = (slots.flags(x, H) for x in (slots.batch, slots.document))
        inputs = list(zip([rows] * slots.count, *flags, each, strict=True))
        outputs, fitted = scan(steps, Fitted(stack(rows, M, S), R), inputs, remat, AT_ONCE)
        M, S = unstack(rows, fitted.stacked)
        last = (tuple(x.unflatten(0, (B, H)) for x in part) for part in (M, S, fitted.references))
    o = from_chunks(torch.cat(outputs), (B, T if slots.place is None else slots.count * size, H))
    return slots.empty(o).to(v.dtype), State(*last, slots.phase)


class DeepMemory(Momentum):
    """Titans' memory for an MLP, with the free gates of Momentum:

        eta = sigmoid(x W_eta + c_eta) ,    theta = (1 - eta) sigmoid(x W_theta + c_theta) / grad_batch ,

    and a, the recipe's decay. The start M_0 is learned: at first the last layer is zero, so that an empty memory reads
    zero, and the others normal with variance 1 / in, or 1 for the first, whose keys have length one. Its parameter
    counts in units of 1 / grad_batch, as its writes do, which it would drown otherwise: after 200 steps of associative
    recall, with mini-batches of 64, 16 % of the answers are right without, 97 % with. (Optimisers that are blind to the
    scale of a gradient have no such unit, and no zeros to make noise of.)

    depth: layers of the MLP, 1 to 4; expansion: its inner widths are expansion K.  activation: silu | gelu.
    residual: f(x) + x, for K = V.  layer_norm: of what is added to x, with learned scale and shift.
    inner_loss: l2 | huber | lp | dot, of which lp has the power `p` and huber the width `delta`.
    inner_optimizer: momentum | sgd, which has no S | sign | adam | shampoo | muon, which step at the end of a mini-
        batch, by the mean of its theta' (batches.py); muon has the mean of eta for a momentum.
    grad_batch: b, a part of the model.  forget_to: start | zero.  remat: as in chunked_deep, a choice of memory.
    """

    fit = "gradient step, momentum"

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        grad_batch: int = 64,
        depth: int = 2,
        expansion: float = 4.0,
        activation: str = "silu",
        residual: bool = False,
        layer_norm: bool = False,
        inner_loss: str = "l2",
        p: float = 1.5,
        delta: float = 1.0,
        inner_optimizer: str = "momentum",
        forget_to: str = "start",
        remat: int = 8,
    ) -> None:
        super().__init__(sizes, backend, chunk, grad_batch, gates="free")
        _check_choice("activation", activation, ACTIVATIONS)
        _check_choice("inner_loss", inner_loss, LOSSES)
        _check_choice("inner_optimizer", inner_optimizer, OPTIMIZERS)
        _check_choice("forget_to", forget_to, FORGET_TO)
        (_, H, _, K, V), inner = sizes, round(expansion * sizes.key_dim)
        if residual and K != V:
            raise ValueError(
                f"regressor.residual=true adds keys of width {K} to values of width {V}; only false is possible"
            )
        for name, value, holds, says in (
            ("depth", depth, 1 <= depth <= 4, "1, 2, 3 or 4"),
            ("expansion", expansion, inner >= 1, f"at least 1 / {K}, for an inner width of one"),
            ("p", p, p >= 1, "at least 1"),
            ("delta", delta, delta > 0, "positive"),
            ("remat", remat, remat >= 0, "a number of chunks, or 0 for never"),
        ):
            if not holds:
                raise ValueError(f"regressor.{name}={value} must be {says}")
        self.remat, self.fades, self.function_class = remat, forget_to == "zero", f"MLP of {depth} layers"
        self.network = Network(activation, residual, inner_loss, {"lp": p, "huber": delta}.get(inner_loss, 0.0))
        optimizer = INNER_OPTIMIZERS.get(inner_optimizer)
        self.rule = None if optimizer is None else batches.Rule(self.network, optimizer)
        widths, scales = [K, *[inner] * (depth - 1), V], [1.0, *[inner**-0.5] * (depth - 1)]
        scales[-1] *= self.rule is not None
        shapes = pairwise(widths)
        self.start = nn.ParameterList(s * torch.randn(H, n, m) for s, (n, m) in zip(scales, shapes, strict=True))
        self.norm = nn.ParameterList([torch.ones(H, 1, V), torch.zeros(H, 1, V)] if layer_norm else [])
        if inner_optimizer != "momentum":
            self.fit = "gradient step" if self.rule is None else f"{inner_optimizer} step for {grad_batch} pairs"
            self.momentum = self.momentum if optimizer is not None and optimizer.has_momentum else None

    def gates(self, x: Tensor, log_decay: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """step_size and log_momentum; of an optimiser that steps at the end of a mini-batch what it sums of both."""
        if self.momentum is not None and self.rule is None:
            return super().gates(x, log_decay)[:2]
        momentum = None if self.momentum is None else wide(self.momentum(x)).sigmoid() / self.grad_batch
        return wide(self.step_size(x)).sigmoid() / self.grad_batch, momentum

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        speed = (self.tokens_at_once(v), self.remat, compiles(v.device))
        backend = self.choose(v.device, v.dtype).backend
        definition = backend == "recurrent" or k.shape[1] == 1  # one token is that
        step_size, momentum = self.gates(x)
        if self.rule is not None:
            nothing = torch.zeros_like(step_size)
            gates = [nothing if y is None else y for y in (log_decay, step_size, momentum)]
            given = (q, k, v, step_size.unsqueeze(-1), torch.stack(gates, dim=-1), state, self.grad_batch, segments)
            return batches.deep_batches(self.rule, self._begin(), *given, *(() if definition else speed))
        start = Start(self.beginning(), self.fades, tuple(self.norm))
        given = (self.network, start, q, k, v, step_size, momentum, log_decay, state, self.grad_batch, segments)
        if definition:
            return recurrent_deep(*given)
        return kernel_deep(*given[1:]) if backend == "triton" else chunked_deep(*given, *speed)

    def beginning(self) -> Weights:
        """M_0 of every layer."""
        *others, last = self.start
        return (*others, last if self.rule is not None else last / self.grad_batch)

    def tokens_at_once(self, v: Tensor) -> int:
        return self.chunk or (self.grad_batch if self.rule is not None else super().tokens_at_once(v))

    def _begin(self) -> batches.Start:
        return batches.Start(self.beginning(), () if self.fades else self.beginning(), tuple(self.norm))

    def recall(self, x: Tensor, q: Tensor, state: Any) -> Tensor:
        dtype = working_dtype(q)
        if self.rule is not None:
            first = batches.beginner(self.rule, self._begin(), len(q), dtype)
            weights = (first if state is None else state.learner).weights
        else:
            weights = Start(self.beginning()).state(state, len(q), dtype, momentum=False).weights
        with torch.autocast(q.device.type, enabled=False):
            products = [partial(torch.matmul, other=w) for w in weights]
            o = self.network.read(products, q.transpose(1, 2).to(dtype), tuple(self.norm))
        return o.transpose(1, 2).to(q.dtype)

    def recall_flops_per_token(self) -> int:
        return 2 * sum(w.numel() for w in self.start)

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        """models/kernels/deep, for the preset's rule and network."""
        for name, has, takes in (
            ("depth", len(self.start), 2),
            ("activation", self.network.activation, "silu"),
            ("residual", self.network.residual, False),
            ("layer_norm", len(self.norm) > 0, False),
            ("inner_loss", self.network.loss, "l2"),
        ):
            if has != takes:
                return {"triton": f"the kernels take regressor.{name}={str(takes).lower()}, not {str(has).lower()}"}
        if self.rule is not None:
            return {"triton": "the kernels take regressor.inner_optimizer=momentum or sgd"}
        widths = (self.key_dim, self.start[0].shape[-1], self.value_dim)
        return {"triton": kernels.refusal(device, dtype, self.grad_batch, widths)}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return "a compiled step" if backend == "torch" and compiles(device) else ""

    def forget(self, state: Any, rows: Tensor) -> Any:
        """The memories of the given rows back at the start, and their mini-batches ended."""
        if self.rule is not None:
            return batches.forget(self.rule, self._begin(), state, rows)
        start = Start(self.beginning(), self.fades)
        first = start.state(None, len(rows), state.weights[0].dtype, bool(state.momenta))
        return batches.restart(first, state, rows)

    def flops_per_token(self, seq_len: int) -> int:
        """With every weight three products (predict, write, read), with all but the first layer's one more (errors
        back); the projections of the gates; and the optimiser's products at the end of each mini-batch.
        """
        weights = sum(w[0].numel() for w in self.start)
        gates = 1 if self.momentum is None else 2
        flops = 2 * self.num_heads * (4 * weights - self.start[0][0].numel() + gates * self.hidden_size)
        if self.rule is None:
            return flops
        return flops + batches.flops_of_steps(self.rule, self.start, seq_len // self.grad_batch) // seq_len

    def state_size(self, seq_len: int) -> int:
        """M, R, and S where there is one; or what batches.Learner has."""
        if self.rule is not None:
            return batches.size(self.rule, self.start)
        return (2 if self.momentum is None else 3) * sum(w.numel() for w in self.start)


def _check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"regressor.{name}={value} is not one of {', '.join(allowed)}")


def compiles(device: torch.device) -> bool:
    """Whether torch.compile can: on a GPU, with Triton."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
