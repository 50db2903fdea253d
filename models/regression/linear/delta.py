"""The delta rule: a memory that corrects itself.

Problem.    The same least squares as linear.py, fitted online: one step a pair, from the memory as it stands, along the
            gradient of what the memory gets wrong,
                S_t = S' - b_t d/dS 1/2 ||v_t - k_t S||^2  at  S' = a_t S_{t-1} .
Solution.   S_t = a_t S_{t-1} + b_t k_t^T (v_t - k_t a_t S_{t-1}) ,    o_t = q_t S_t .
            The pair writes only what the memory did not know yet, so similar keys overwrite one another instead of
            piling up. With |k| = 1, b = 0 writes nothing, b = 1 stores v exactly, b = 2 reflects along k; a step is
            stable while b |k|^2 < 2.
Decay.      a = 1: the delta rule of Widrow and Hoff (1960) as a fast weight programmer (Schlag et al. 2021, section
            4.2), trained in parallel as DeltaNet (Yang et al. 2024). A decay per head and token: Gated DeltaNet (Yang,
            Kautz and Hatamizadeh 2025, equation 10); per channel of the keys, diag(a) for a: Kimi Delta Attention (Kimi
            Linear 2025, section 3). b in (0, 2): negative eigenvalues, which state tracking needs (Grazzi et al. 2025).
            The decay comes before the step. With the gradient taken first, at S' = S_{t-1}, it is another model, SGD
            with weight decay or leaky LMS,
                S_t = a_t S_{t-1} + b_t k_t^T (v_t - k_t S_{t-1}) ,
            which is the first with b/a for b and a v for v; those overflow where a gate closes, this does not.
Steps.      Four ways to go along the gradient for b, all on the line from S' and so all the rule above, with a step of
            b f(b |k|^2): the gradient step, f(s) = 1; the implicit one, to argmin ||S - S'||^2 + b ||v - k S||^2,
            f(s) = 1 / (1 + s) (Longhorn, Liu et al. 2024, theorem 3.1); the exact solution of dS/db = -gradient,
            f(s) = (1 - e^-s) / s (EFLA, Lei et al. 2025); and the share b of the way to the nearest memory that knows
            the pair, argmin ||S - S'||^2 with k S = v, a step of b / (|k|^2 + 1e-6) (Kaczmarz 1937; normalised LMS,
            Nagumo and Noda 1967; Kaczmarz Linear Attention, Zou, Ren and Liu 2026, arXiv 2605.08587). The last three
            are stable for keys of any length.
Exactness.  The chunked form equals the recurrence up to rounding, whatever the chunk, gradients included.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunk.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.kernels import channel_delta, delta, fla, momentum
from models.parts.decay import Rates
from models.parts.linear import read
from models.parts.precision import wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.chunks import short
from models.regression.documents import forget_at_starts
from models.regression.linear.delta_chunks import ChunkedDelta
from models.regression.memory import Memory, first_memory
from models.regression.regressor import FORGET, Tokens

LEAST_SQUARE = 1e-6  # added to |k|^2 where a step divides by it, as the authors of Kaczmarz Linear Attention do


def recurrent_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
    write_key: Tensor | None = None,
    gradient_before_decay: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time.

    q, k: [B, T, H, K].  v: [B, T, H, V].  step_size: [B, T, H], b above.  log_decay: [B, T, H] or [B, T, H, K], natural
    log of a, <= 0, or None for a = 1.  memory: [B, H, K, V] or None for zeros.  write_key: [B, T, H, K], w in
    S_t = S' + b w^T (v - k S'), or None for k.  gradient_before_decay: the error is that of the memory before it
    decays. At FORGET there is none: the memory is empty before anything else.
    Returns o [B, T, H, V] in the dtype of v, and the memory after the last token. Computed in float32 at least.
    """
    dtype = working_dtype(q, k, v)
    out_dtype, (q, k, v, step_size) = v.dtype, (x.to(dtype) for x in (q, k, v, step_size))
    w = k if write_key is None else write_key.to(dtype)
    memory = first_memory(k, v, memory)
    if log_decay is not None:
        log_decay = log_decay.unsqueeze(-1) if log_decay.ndim == 3 else log_decay
        decay, forgets = log_decay.to(dtype).exp().unsqueeze(-1).unbind(1), (log_decay <= FORGET).unsqueeze(-1)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        # unbind, since the gradient of x[:, t] is as long as x, which makes the square of T
        given = (x.unbind(1) for x in (q, k, v, w, step_size))
        for t, (q_t, k_t, v_t, w_t, b_t) in enumerate(zip(*given, strict=True)):
            seen = memory
            if log_decay is not None:
                memory = decay[t] * memory
                seen = seen.masked_fill(forgets[:, t], 0.0) if gradient_before_decay else memory
            error = v_t - (k_t.unsqueeze(-2) @ seen).squeeze(-2)
            memory = memory + w_t.unsqueeze(-1) @ (b_t.unsqueeze(-1) * error).unsqueeze(-2)
            outputs.append((q_t.unsqueeze(-2) @ memory).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), memory


def chunked_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
    chunk: int = 32,
    write_key: Tensor | None = None,
    gradient_before_decay: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same map, C tokens at a time: one triangular system for each chunk, all at once, then a scan over chunks.

    Call u_t = b_t (v_t - k_t a_t S_{t-1}) what token t writes, under its key w_t. From the chunk's first memory S, with
    c the cumulative log decay, S_t = e^{c_t} S + sum_{i<=t} e^{c_t - c_i} w_i^T u_i, so the writes of a chunk solve a
    unit lower triangular system (Yang et al. 2024, section 3.2; with decays, Yang et al. 2025, section 3.3):
        (I + A) U = diag(b) (V - diag(e^c) K S) ,    A_ti = b_t L_ti k_t.w_i  for i < t ,    L_ti = e^{c_t - c_i} .
    With R = (I + A)^-1 it falls into what is known before the memory is, and what waits for it:
        U = R diag(b) V - Y S ,    Y = R diag(b e^c) K ,    O = diag(e^c) Q S + (Q W^T * L) U ,
        S' = e^{c_C} S + Z^T U ,    Z = diag(e^{c_C - c}) W .
    All but the two lines' products with S is done for every chunk at once; the scan is two products a chunk.
    Where the gradient comes before the decay, K reads with c_{t-1} for c_t. Where channels fade at their own rates, L
    stands inside the sum over channels, k_t.w_i, which takes a product for each halving of a chunk (halvings.py).

    Arguments and results as in recurrent_delta. T need not be a multiple of the chunk.
    """
    memory, chunk = first_memory(k, v, memory), short(chunk, k.shape[1])
    o, memory = ChunkedDelta.apply(q, k, write_key, v, step_size, log_decay, memory, chunk, gradient_before_decay)
    return o.to(v.dtype), memory


def kernel_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
    write_key: Tensor | None = None,
    gradient_before_decay: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same map by models/kernels/delta, models/kernels/channel_delta or, what those do not compute,
    models/kernels/momentum. Arguments and results as in recurrent_delta, a log_decay per channel without a write_key
    and after the decay alone; q, k, v and write_key are cast to one dtype, v's.
    """
    if log_decay is not None and log_decay.ndim == 4:
        assert write_key is None and not gradient_before_decay
        return channel_delta.delta_rule(q, k, v, step_size, log_decay, first_memory(k, v, memory))
    if write_key is None and not gradient_before_decay and delta.takes(v.dtype, k.shape[-1], v.shape[-1]):
        return delta.delta_rule(q, k, v, step_size, log_decay, first_memory(k, v, memory))
    matrices, source = first_memory(k, v, memory).unsqueeze(2), None
    if gradient_before_decay and log_decay is not None:  # at the start of a document there is nothing to erase
        token = torch.arange(q.shape[1], device=q.device) - 1
        source = torch.where(log_decay[..., 0] < FORGET / 2, momentum.EMPTY, token)
    rule = momentum.Rule(momentum=False, decayed=not gradient_before_decay)
    call = momentum.Call(q, k, v, step_size, None, log_decay, matrices, write_key, source)
    o, matrices = momentum.momentum_delta(call, rule)
    return o, matrices.squeeze(2)


def kernel_delta_of_rates(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    rates: Rates,
    memory: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """kernel_delta with the log decay forget_at_starts(rates.made(), segments), which the kernels make."""
    gates = channel_delta.Gates(rates.raw, rates.bias, rates.log_rate, segments)
    return channel_delta.delta_rule(q, k, v, step_size, gates, first_memory(k, v, memory))


def _decayed_share(s: Tensor) -> Tensor:
    """(1 - e^-s) / s, which is 1 at 0. For small s by its series: the derivative of the quotient is a difference of two
    terms of 1 / s, and 1e-3 is where the series to the fourth order is as exact as float64 needs."""
    small = s < 1e-3
    large = s.masked_fill(small, 1.0)
    series = 1 - s / 2 * (1 - s / 3 * (1 - s / 4 * (1 - s / 5)))
    return torch.where(small, series.masked_fill(~small, 0.0), -torch.expm1(-large) / large)


# The step's share of b, from b and |k|^2; None: all of it.
STEPS: dict[str, Any] = {
    "gradient": None,
    "implicit": lambda b, square: 1 / (1 + b * square),
    "exact": lambda b, square: _decayed_share(b * square),
    "normalized": lambda b, square: 1 / (square + LEAST_SQUARE),
}


class Delta(Memory):
    """The delta rule with a learned step size per head and token: b f(b |k|^2), b = sigmoid(x W + c).

    Without a decay it is DeltaNet, with one per head Gated DeltaNet, with one per channel Kimi Delta Attention.

    step: f. gradient (keys of unit length keep it stable; the shell normalises them), implicit, exact or normalized
        (stable for all keys).
    negative_eigenvalues: b up to 2, for gradient and normalized steps: a write can turn a direction of the memory
        around.
    gradient_before_decay: leaky LMS, for a decay per head without a sign, which its error would see.
    bias: c; false leaves it out, as Qwen3-Next and fla do.
    """

    accepts_decay: tuple[str, ...] = ("none", "head", "channel", "signed")
    reads: ClassVar[tuple[str, ...]] = ("step_size",)

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        step: str = "gradient",
        negative_eigenvalues: bool = False,
        gradient_before_decay: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(sizes, backend, chunk)
        if step not in STEPS:
            raise ValueError(f"regressor.step={step} is not one of {', '.join(STEPS)}")
        if negative_eigenvalues and (step in ("implicit", "exact") or gradient_before_decay):
            setting = "regressor.gradient_before_decay=true" if gradient_before_decay else f"regressor.step={step}"
            why = "grows the memory without bound" if gradient_before_decay else "never goes past the value"
            raise ValueError(f"regressor.negative_eigenvalues=true: {setting} {why}; only false is possible")
        self.share, self.fit = STEPS[step], f"{step} step"
        self.largest_step = 2.0 if negative_eigenvalues else 1.0
        self.gradient_before_decay = gradient_before_decay
        if gradient_before_decay:
            self.fit += " before decay"
            self.accepts_decay = ("none", "head")
        self.step_size = nn.Linear(sizes.hidden_size, sizes.num_heads * self.pairs_per_token, bias)

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        step_size = self.steps(x, k)
        if log_decay is not None and self.gradient_before_decay:
            log_decay = log_decay.clamp(min=FORGET / 2)  # a gate that closes is no document's end: e^-32 is 0 to it too
        if isinstance(log_decay, Rates):
            return kernel_delta_of_rates(q, k, v, step_size, log_decay, state, segments)
        log_decay = forget_at_starts(log_decay, segments, like=q)
        # one token is the definition itself, on every backend
        backend = "recurrent" if q.shape[1] == 1 else self.choose(v.device, v.dtype).backend
        return self.solve(backend, q, k, v, step_size, log_decay, state)

    def makes_decay(self, v: Tensor) -> bool:
        """Relatives, which read it themselves, do not."""
        if type(self) is not Delta or self.decay_kind != "channel" or v.shape[1] == 1:
            return False
        return self.choose(v.device, v.dtype).backend == "triton"

    def steps(self, x: Tensor, k: Tensor) -> Tensor:
        """b f(b |k|^2), [B, T n, H]."""
        b = self.largest_step * wide(read(self.step_size, x)).sigmoid().view(k.shape[:3])
        return b if self.share is None else b * self.share(b, wide(k).square().sum(-1))

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"step_size": self.steps(tokens.x, tokens.k)}

    def solve(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        """The rule from the state, which is the memory and what a relative has beside it."""
        return self.take_steps(backend, q, k, v, step_size, log_decay, state)

    def take_steps(
        self,
        backend: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step_size: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        write_key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The rule by one of its forms. Arguments and results as recurrent_delta's, the state for the memory."""
        early = self.gradient_before_decay
        if backend == "recurrent":
            return recurrent_delta(q, k, v, step_size, log_decay, state, write_key, early)
        if backend == "fla" and write_key is not None:
            return fla.delta_with_write_key(q, k, v, step_size, log_decay, state, write_key, early)
        if backend == "fla":
            form = fla.leaky_delta if early else fla.gated_delta
            return form(q, k, v, step_size, log_decay, state)
        if backend == "triton":
            return kernel_delta(q, k, v, step_size, log_decay, state, write_key, early)
        return chunked_delta(q, k, v, step_size, log_decay, state, self.tokens_at_once(v), write_key, early)

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        shape = device, dtype, self.key_dim, self.value_dim
        early = self.gradient_before_decay and self.decay_kind != "none"
        found = {"fla": (fla.refusal_leaky_delta if early else fla.refusal_gated_delta)(*shape)}
        if self.decay_kind == "channel":
            found["triton"] = channel_delta.refusal(*shape)
            return dict(reversed(found.items())) if delta.faster(device) else found
        own = not early and delta.takes(dtype, self.key_dim, self.value_dim)
        found["triton"] = (delta if own else momentum).refusal(*shape)
        flash = fla.FLASH_QLA and self.decay_kind == "head"
        return dict(reversed(found.items())) if own and delta.faster(device) and not flash else found

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        if backend != "fla":
            return ""
        if self.gradient_before_decay and self.decay_kind != "none":
            return fla.route_leaky_delta(device)
        return fla.route_gated_delta(device, self.decay_kind, dtype)

    def flops_per_token(self, seq_len: int) -> int:
        """Three products with the memory (predict, write, read), and the step sizes' projection."""
        return self.num_heads * (6 * self.key_dim * self.value_dim + 2 * self.hidden_size)
