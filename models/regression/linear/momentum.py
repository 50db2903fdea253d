"""The delta rule with momentum: a memory that keeps moving the way it was told to.

Problem.    The same least squares as delta.py, fitted online by gradient descent with momentum and weight decay:
                l_t(M) = 1/2 ||v_t - k_t M||^2 .
Solution.   S_t = eta_t S_{t-1} - theta_t grad l_t(M_ref) = eta_t S_{t-1} + theta_t k_t^T (v_t - k_t M_ref)
            M_t = a_t M_{t-1} + S_t ,    o_t = q_t M_t .
            (Titans, Behrouz et al. 2025, equations 13 to 15, for a memory that is a matrix; a = 1 - alpha, and the 2 of
            the paper's loss is in theta.) A surprise S lasts: it is written again, weaker by eta, at every later token.
Gradients.  With `grad_batch` 1 a gradient is taken where the memory stands, M_ref = M_{t-1}: the exact rule. With
            grad_batch b the tokens of a document fall into mini-batches of b, and all of one take theirs at the memory
            after the previous one (equation 16; the paper's t - mod(t, b) would show a mini-batch's last token its own
            write). It is a part of the model, of any size, and has nothing to do with the chunk of the computation.
Members.    eta = 0: leaky LMS, a M + theta k^T (v - k M). grad_batch as long as the sequence: one linear attention over
            the errors of the first memory. With grad_batch 1, Momentum DeltaNet (Huang et al. 2026) with its write gate
            at 1.
Stability.  Free gates let it diverge, with steps of (1 - eta) as well: one token writes with eta near 0, those after it
            keep S moving with eta near 1, past the target, and so again, a larger error every time. (Trained on text
            that repeats, at the largest steps, memories reached 1e19.) So the gates are tied, through D, what is still
            to be written: with eta and theta' in [0, 1]
                U_t = D_{t-1} - (1 - eta_t) theta'_t grad l_t(M_ref) ,
                M_t = a_t (M_{t-1} + (1 - eta_t) U_t) ,    D_t = a_t eta_t U_t ,
            the rule above for S_t = a_t (1 - eta_t) U_t, where the momentum is a_t (1 - eta_t) eta_{t-1} / (1 -
            eta_{t-1}): eta_t where nothing varies or fades. |M + D|^2 + |D|^2 then never grows for v = 0, grad_batch 1
            and keys no longer than one, whatever the gates: as a function of theta' it is convex, and it does not grow
            for 0 and 1. `gates: free` is the rule as published, with theta = (1 - eta) theta'. Gradients of a
            mini-batch add up where their keys agree, so that theta' <= 1 / b.
Exactness.  The chunked form equals the recurrence up to rounding, whatever the chunk, gradients included.
Others.     fla 0.6.0's chunk_momentum_delta_rule is not among the backends. It refuses float32, and the PyTorch code
            beneath it divides by cumulated momenta. In float32, chunks of 64, momenta from sigmoid(N(0, 1)), its
            outputs are wrong by 81 % and its gradients by 10^15; at a constant momentum of 0.8 by 0.3 % and 5 %, at 0.1
            they are NaN. Here both are right to 1e-6 at any momentum (scripts/momentum_accuracy.py).

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks, M = N B H, W writes of a chunk, n
matrices of the state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import momentum as kernels
from models.parts.linear import read
from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.chunks import from_chunks, into_chunks, short
from models.regression.linear.coefficients import mixtures
from models.regression.linear.mixtures import scan
from models.regression.linear.references import State, last_state, opening
from models.regression.memory import Memory
from models.regression.regressor import Tokens

GATES = ("tied", "free")


def recurrent_momentum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    grad_batch: int = 1,
    segments: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The definition, one token at a time.

    q: [B, T, H, K].  k: [B, T c, H, K], v: [B, T c, H, V] and step_size: [B, T c, H], theta above: those of a token one
    after another, where it makes c writes; all their errors are taken at its M_ref.  log_momentum and log_decay:
    [B, T, H], natural logs of eta and a, <= 0; log_decay None for a = 1.  state: None for zeros.  segments: [B, T],
    documents.  Returns o [B, T, H, V] in the dtype of v, and the state after the last token. Computed in float32 at
    least.
    """
    dtype, out_dtype, T = working_dtype(q, k, v), v.dtype, q.shape[1]
    state, log_momentum, log_decay, where = opening(q, k, v, log_momentum, log_decay, state, grad_batch, segments)
    memory, momentum, reference = state[:3]
    reference = memory if reference is None else reference
    with torch.autocast(q.device.type, enabled=False):
        # [B, T, H, c, *]
        keys, values, steps = (
            x.to(dtype).unflatten(1, (T, -1)).transpose(2, 3) for x in (k, v, step_size.unsqueeze(-1))
        )
        q, eta, outputs = q.to(dtype), log_momentum.to(dtype).exp(), []
        decay = torch.ones_like(eta) if log_decay is None else log_decay.to(dtype).exp()
        given = (x.unbind(1) for x in (q, keys, values, steps, *(x[..., None, None] for x in (eta, decay))))
        for t, (q_t, k, v, theta, eta_t, decay_t) in enumerate(zip(*given, strict=True)):
            begins, nothing = (where.source[:, t] == t - 1).view(-1, 1, 1, 1), where.empty[:, t].view(-1, 1, 1, 1)
            reference = torch.where(begins, memory, reference).masked_fill(nothing, 0.0)
            momentum = eta_t * momentum + k.mT @ (theta * (v - k @ reference))
            memory = decay_t * memory + momentum
            outputs.append((q_t.unsqueeze(-2) @ memory).squeeze(-2))
        o = torch.stack(outputs, dim=1).to(out_dtype)
    return o, last_state((memory, momentum, reference)[: len(state.matrices)], where.phase)


def chunked_momentum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    grad_batch: int = 1,
    segments: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, State]:
    """The same map, C tokens at a time: one triangular system for each chunk, all at once, then a scan over chunks.

    Within a chunk every matrix that matters is a combination, with one number per head for each, of the chunk's first
    memory and momentum and of its writes k_i^T u_i, u_i = v_i - k_i M_ref(i). With L_ti the product of the gates after
    i up to t, of a and of eta, and A and m those from the chunk's beginning,
        M_t = A_t M_0 + f_t S_0 + sum_{i<=t} G_ti k_i^T u_i ,    G = L_a L_eta diag(theta) ,    f = L_a m ,
        S_t = m_t S_0 + sum_{i<=t} (L_eta)_ti theta_i k_i^T u_i .
    No factor is negative, so that nothing cancels: G has the digits of its factors at any momentum. M_ref(t) is M_s of
    an earlier token, with G_s, A_s and f_s; or M_0; or, its mini-batch begun in an earlier chunk, a third matrix
    that is carried along, R_0. Since s < t the errors of a chunk solve one unit lower triangular system,
        (I + K K^T * G_s) U = V - diag(A_s) K M_0 - diag(f_s) K S_0 - diag(r) K R_0 .
    Where a token makes c writes the columns of its i are repeated for each of them, and the system has C c rows.

    Arguments and results as in recurrent_momentum. T need not be a multiple of the chunk.
    """
    C, c = short(chunk, q.shape[1]), k.shape[1] // q.shape[1]
    state, log_momentum, log_decay, where = opening(q, k, v, log_momentum, log_decay, state, grad_batch, segments)
    dtype = state.memory.dtype
    with torch.autocast(q.device.type, enabled=False):
        mixed = mixtures(step_size, log_momentum, log_decay, where, C, dtype, grad_batch > 1)
        Q, K, V = (into_chunks(x, n, dtype) for x, n in ((q, C), (k, C * c), (v, C * c)))
        o, matrices = scan(Q, K, V, *mixed, state.matrices)
    return from_chunks(o, q.shape[:3]).to(v.dtype), last_state(matrices, where.phase)


def kernel_momentum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    grad_batch: int = 1,
    segments: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The same map by models/kernels/momentum, in chunks of its CHUNK. Arguments and results as in recurrent_momentum;
    q, k and v are cast to one dtype, v's.

    The c writes of a token are tokens to the kernels: at the first of a token S fades; at the last M does, S joins it,
    and it is read. Until then M stands still, so that M_{t-1} is what the write before has left, though a chunk begin
    in between.
    """
    writes = k.shape[1] // q.shape[1]
    # mini-batches that are the chunks: no error of a chunk refers to another
    together = grad_batch * writes == kernels.CHUNK and state is None and segments is None
    state, log_momentum, log_decay, where = opening(q, k, v, log_momentum, log_decay, state, grad_batch, segments)
    source = None
    if grad_batch > 1 or segments is not None:
        # of the writes after which M is still that of token `source`, the last before the one that refers
        before = torch.arange(k.shape[1], device=k.device) - 1
        source = ((where.source + 2) * writes - 2).repeat_interleave(writes, 1).minimum(before)
        source = source.masked_fill(where.empty.repeat_interleave(writes, 1), kernels.EMPTY)
    log_decay = _among(log_decay, writes - 1, writes)
    log_momentum = _among(log_momentum, 0, writes)
    rule = kernels.Rule(carried=grad_batch > 1, solve=not together, writes=writes)
    matrices, q = torch.stack(state.matrices, dim=2), _among(q, writes - 1, writes)
    call = kernels.Call(q, k, v, step_size, log_momentum, log_decay, matrices, source=source)
    o, matrices = kernels.momentum_delta(call, rule)
    return o[:, writes - 1 :: writes], last_state(matrices.unbind(2), where.phase)


def _among(x: Tensor | None, place: int, writes: int) -> Tensor | Any:
    """[B, T, H, *] to [B, T writes, H, *]: x at one place of every token's, zeros at the others. None for None."""
    if x is None or writes == 1:
        return x
    others = [0, 0] * (x.ndim - 2) + [place, writes - 1 - place]
    return F.pad(x.unsqueeze(2), others).flatten(1, 2)


class Momentum(Memory):
    """Titans' memory for a matrix, with learned gates per head and token, all from x:

        eta = sigmoid(x W_eta + c_eta) ,    theta' = sigmoid(x W_theta + c_theta) / grad_batch ,

    and a, the recipe's decay.

    gates: tied, as above: with keys of unit length, which the shell makes, none let it diverge. free: the momentum is
        eta and theta = (1 - eta) theta', which is as stable only where gates do not vary.
    grad_batch: the tokens of a mini-batch, whose gradients are taken at the memory before it; 1 is the exact rule.
    """

    accepts_decay: tuple[str, ...] = ("none", "head")
    fit = "gradient step, momentum"
    reads: ClassVar[tuple[str, ...]] = ("step_size", "momentum")

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        grad_batch: int = 1,
        gates: str = "tied",
    ) -> None:
        super().__init__(sizes, backend, chunk)
        if grad_batch < 1:
            raise ValueError(f"regressor.grad_batch={grad_batch} is no number of tokens; a positive integer")
        if gates not in GATES:
            raise ValueError(f"regressor.gates={gates} is not one of {', '.join(GATES)}")
        self.grad_batch, self.tied = grad_batch, gates == "tied"
        self.step_size = nn.Linear(sizes.hidden_size, sizes.num_heads)
        self.momentum = nn.Linear(sizes.hidden_size, sizes.num_heads)

    def gates(self, x: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
        """step_size and log_momentum [B, T, H] of the rule, and what the last S is kept as: where gates are tied D, S
        times eta / (1 - eta) [B, H, 1, 1], which the first token finds in its place. eta / (1 - eta) is the exponential
        of its logit, which is held to 12: a momentum that lasts 160,000 tokens.

        1 - eta as sigmoid of the negative, log eta as logsigmoid: neither loses its digits where eta is near 1 or 0.
        """
        if not self.tied:
            logit = wide(read(self.momentum, x))
            step_size = (-logit).sigmoid() * wide(read(self.step_size, x)).sigmoid() / self.grad_batch
            return step_size, F.logsigmoid(logit), 1.0
        logit = wide(read(self.momentum, x)).clamp(max=12.0)
        log_rest = F.logsigmoid(-logit)
        log_written = log_rest if log_decay is None else log_rest + wide(log_decay)
        step_size = (log_written + log_rest).exp() * wide(read(self.step_size, x)).sigmoid() / self.grad_batch
        return step_size, log_written + F.pad(logit[:, :-1], (0, 0, 1, 0)), logit[:, -1, :, None, None].exp()

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        step_size, log_momentum, remaining = self.gates(x, log_decay)
        gates = (step_size, log_momentum, log_decay)
        o, state = self.form(tokens)(q, k, v, *gates, state, self.grad_batch, segments)
        return o, state.times(remaining)

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        """theta' grad_batch and eta."""
        return {name: wide(read(getattr(self, name), tokens.x)).sigmoid() for name in ("step_size", "momentum")}

    def form(self, tokens: Tokens) -> Callable[..., tuple[Tensor, State]]:
        """recurrent_momentum or one of the same map, for this call."""
        backend = self.choose(tokens.v.device, tokens.v.dtype).backend
        if backend == "recurrent" or tokens.q.shape[1] == 1:  # one token is the definition
            return recurrent_momentum
        return (
            kernel_momentum if backend == "triton" else partial(chunked_momentum, chunk=self.tokens_at_once(tokens.v))
        )

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        return {"triton": kernels.refusal(device, dtype, self.key_dim, self.value_dim)}

    def forget(self, state: Any, rows: Tensor) -> Any:
        """The matrices of the given rows emptied, and their mini-batches ended."""
        matrices = tuple(super(Momentum, self).forget(x, rows) for x in state.matrices)
        return last_state(matrices, rows if state.phase is None else state.phase.masked_fill(rows, 0))

    def flops_per_token(self, seq_len: int) -> int:
        """Three products with the memory (predict, write, read), and the projections of the gates."""
        return self.num_heads * (6 * self.key_dim * self.value_dim + 4 * self.hidden_size)

    def state_size(self, seq_len: int) -> int:
        """M and S, and M_ref for mini-batches."""
        return super().state_size(seq_len) * (2 if self.grad_batch == 1 else 3)
