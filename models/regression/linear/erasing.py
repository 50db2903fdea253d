"""The delta rule taken apart: what is erased, what is written and what is read need not be one key.

Problem.    A step of delta.py writes b (v - k S') under k, along the gradient of 1/2 ||v - k S'||^2 at S' = a S_{t-1}.
            One number b says both how much of the old value goes and how much of the new one comes, and one key what
            is looked up, changed and read. Every member here takes some of these apart. What its step goes down is
            -(k S) . u with the residual u held: what is missing, as the member measures it, is written under k.
Members.    GatedDelta2 (Gated DeltaNet-2, Hatamizadeh, Choi and Kautz 2026, arXiv 2605.22791): how much is erased, per
            channel of the keys, and how much is written, per channel of the values,
                S_t = S' + k_t^T u_t ,    u_t = w_t * v_t - (b_t * k_t) S' ,    S' = diag(a_t) S_{t-1} .
            With b = w one number it is Kimi Delta Attention, with a one number too Gated DeltaNet.
            Comba (Hu et al. 2025, arXiv 2506.02475): the old value is looked up a share d of the step, before it fades;
            and the read is corrected by what was looked up,
                S_t = a_t S_{t-1} + b_t k_t^T u_t ,    u_t = v_t - d k_t S_{t-1} ,    o_t = (q_t - D d k_t) S_t .
            With d = 1 and D = 0 it is leaky LMS (delta.py), or Gated DeltaNet where gradient_before_decay=false.
            Rwkv7 (Peng et al. 2025, arXiv 2503.14456, section 4.1): the erased key is a key of its own, of length one,
                S_t = diag(a_t) S_{t-1} - (e_t * x_t)^T (x_t S_{t-1}) + y_t^T v_t ,
                x_t = k_t * c / |k_t * c| ,    y_t = k_t * (1 + (e_t - 1) * m) ,
            e_t a learning rate in (0, 1) per channel, c and m learned. A step may erase elsewhere than it writes.
Parallel.   All three are delta.py's rule with a write key: GatedDelta2 looks up b * k, Comba d k. Rwkv7 is two such
            steps a token, the first erases (value 0, write key e * x), the second writes (it looks up nothing).
Differs.    Comba's published layer (fla 0.6.0, layers/comba.py) brings q - D d k and d k to length one once more, which
            undoes d; here they stay as they are. d = sigmoid(1) and D = 1 at the start, as there. RWKV-7's decay is a
            part of the recipe; its token shift, its value residual and its bonus for the newest pair are a part of the
            published layer's shell, and not here.
Exactness.  Equal to the recurrence up to rounding, whatever the chunk.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import fla, momentum
from models.parts.linear import read
from models.parts.norm import unit
from models.parts.precision import NORM_EPS, wide, working_dtype
from models.parts.sizes import Sizes
from models.regression.documents import forget_at_starts
from models.regression.linear.delta import Delta, chunked_delta
from models.regression.memory import first_memory
from models.regression.regressor import FORGET, Regressor, Tokens


class GatedDelta2(Delta):
    """b = sigmoid(x W_b) [B, T, H, K] erases, w = sigmoid(x W_w) [B, T, H, V] writes.

    negative_eigenvalues: b up to 2.
    """

    weighs_values = False  # every channel of a value has a weight of its own
    reads = ("erase", "write")

    def __init__(
        self, sizes: Sizes, backend: str = "auto", chunk: int | None = None, negative_eigenvalues: bool = False
    ) -> None:
        super().__init__(sizes, backend, chunk, negative_eigenvalues=negative_eigenvalues)
        self.fit = "gradient step by channel"
        del self.step_size
        self.erase = nn.Linear(sizes.hidden_size, self.num_heads * self.key_dim, bias=False)
        self.write = nn.Linear(sizes.hidden_size, self.num_heads * self.value_dim, bias=False)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """b and w."""
        products = read(self.erase, x), read(self.write, x)
        b, w = (wide(y).sigmoid().unflatten(-1, (self.num_heads, -1)) for y in products)
        return self.largest_step * b, w

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        b, w = self.gates(x)
        log_decay = forget_at_starts(log_decay, segments, like=q)
        backend = "recurrent" if q.shape[1] == 1 else self.choose(v.device, v.dtype).backend
        if backend == "fla":
            return fla.gated_delta_2(q, k, v, b, w, log_decay, state)
        erase_key, value = (b * k).to(k.dtype), (w * v).to(v.dtype)
        one = torch.ones(k.shape[:3], dtype=b.dtype, device=k.device)
        return self.take_steps(backend, q, erase_key, value, one, log_decay, state, k)

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        """Means over channels."""
        b, w = self.gates(tokens.x)
        return {"step_size": b.mean(-1), "write_weight": w.mean(-1)}

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        shape = device, dtype, self.key_dim, self.value_dim
        found = {"fla": fla.refusal_gated_delta(*shape)}
        return found if self.decay_kind == "channel" else found | {"triton": momentum.refusal(*shape, own_writes=True)}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return "chunk_gdn2" if backend == "fla" else ""

    def flops_per_token(self, seq_len: int) -> int:
        """Three products with the memory, and the gates' projections."""
        K, V = self.key_dim, self.value_dim
        return self.num_heads * (6 * K * V + 2 * self.hidden_size * (K + V))


class Comba(Delta):
    """The delta rule with a share d of the old value, and reads corrected by D; both are learned per head.

    gradient_before_decay: what is erased is looked up before it fades, as published.
    correction: D at the start. The published layer has 1, and names 0.02 for small models.
    """

    accepts_decay: tuple[str, ...] = ("none", "head")

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        gradient_before_decay: bool = True,
        correction: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__(sizes, backend, chunk, gradient_before_decay=gradient_before_decay, bias=bias)
        self.accepts_decay = type(self).accepts_decay
        self.fit = "corrected gradient step"
        self.feedback = nn.Parameter(torch.ones(self.num_heads))
        self.correction = nn.Parameter(torch.full((self.num_heads,), float(correction)))

    def solve(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        looked_up = wide(self.feedback).sigmoid().unsqueeze(-1) * k
        q = q - wide(self.correction).unsqueeze(-1) * looked_up
        q, looked_up = q.to(k.dtype), looked_up.to(k.dtype)
        return self.take_steps(backend, q, looked_up, v, step_size, log_decay, state, k)

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        shape = device, dtype, self.key_dim, self.value_dim
        return {"fla": fla.refusal_write_key(*shape), "triton": momentum.refusal(*shape, own_writes=True)}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return "chunk_comba" if backend == "fla" else ""

    recall = Regressor.recall  # a read is corrected by the key of its own token


def recurrent_rwkv7(
    q: Tensor,
    write_key: Tensor,
    v: Tensor,
    erase_key: Tensor,
    rate: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time: S_t = a S_{t-1} - (e * x)^T (x S_{t-1}) + y^T v.

    q, write_key y, erase_key x, rate e: [B, T, H, K].  v: [B, T, H, V].  log_decay: [B, T, H] or [B, T, H, K], natural
    log of a, or None for a = 1; at FORGET nothing is erased, for the memory is empty before anything else.
    memory: [B, H, K, V] or None for zeros.
    Returns o [B, T, H, V] in the dtype of v, and the memory after the last token. Computed in float32 at least.
    """
    dtype = working_dtype(q, write_key, v)
    out_dtype, (q, y, v, x, e) = v.dtype, (z.to(dtype) for z in (q, write_key, v, erase_key, rate))
    memory, outputs = first_memory(y, v, memory), []
    if log_decay is not None:
        log_decay = (log_decay.unsqueeze(-1) if log_decay.ndim == 3 else log_decay).to(dtype).unsqueeze(-1)
        decay = log_decay.exp().unbind(1)
    with torch.autocast(q.device.type, enabled=False):
        for t, (q_t, y_t, v_t, x_t, z_t) in enumerate(zip(*(z.unbind(1) for z in (q, y, v, x, e * x)), strict=True)):
            erased = x_t.unsqueeze(-2) @ memory
            if log_decay is not None:
                erased = erased.masked_fill((log_decay[:, t] <= FORGET).any(-2, keepdim=True), 0.0)
                memory = decay[t] * memory
            memory = memory - z_t.unsqueeze(-1) @ erased + y_t.unsqueeze(-1) @ v_t.unsqueeze(-2)
            outputs.append((q_t.unsqueeze(-2) @ memory).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), memory


def chunked_rwkv7(
    q: Tensor,
    write_key: Tensor,
    v: Tensor,
    erase_key: Tensor,
    rate: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """The same map by delta.py's, two steps a token: one that erases, with the value 0, and one that writes, and looks
    up nothing. Arguments and results as in recurrent_rwkv7."""
    zero = torch.zeros_like(q)
    pairs = ((zero, q), (erase_key, zero), (torch.zeros_like(v), v), (rate * erase_key, write_key))
    q, k, v, w = (torch.stack(pair, dim=2).flatten(1, 2) for pair in pairs)
    if log_decay is not None:
        log_decay = torch.stack([log_decay, torch.zeros_like(log_decay)], dim=2).flatten(1, 2)
    one = torch.ones(k.shape[:3], dtype=w.dtype, device=w.device)
    o, memory = chunked_delta(q, k, v, one, log_decay, memory, chunk, w, gradient_before_decay=True)
    return o[:, 1::2], memory


class Rwkv7(Delta):
    """RWKV-7's memory. e = sigmoid(x W_1 W_2 + c), by a bottleneck of `rank`; None: of the values' width."""

    accepts_decay: tuple[str, ...] = ("none", "head", "channel")
    reads = ("bottleneck",)
    chunked = staticmethod(chunked_rwkv7)

    def __init__(self, sizes: Sizes, backend: str = "auto", chunk: int | None = None, rank: int | None = None) -> None:
        if rank is not None and rank < 1:
            raise ValueError(f"regressor.rank={rank} must be at least 1, or null for the width of the values")
        super().__init__(sizes, backend, chunk)
        # A compiler would write its scan out, of two steps a token. Not a decorator, which imports the compiler.
        Rwkv7.chunked = staticmethod(torch.compiler.disable(chunked_rwkv7))
        self.fit, self.gradient_before_decay = "a step that erases, one that writes", True
        del self.step_size
        channels, rank = self.num_heads * self.key_dim, rank or self.value_dim
        self.bottleneck, self.expansion = nn.Linear(sizes.hidden_size, rank, bias=False), nn.Linear(rank, channels)
        self.erase_scale = nn.Parameter(torch.ones(self.num_heads, self.key_dim))
        self.mix = nn.Parameter(torch.ones(self.num_heads, self.key_dim))

    def rates(self, x: Tensor) -> Tensor:
        """e [B, T, H, K]."""
        return wide(self.expansion(read(self.bottleneck, x))).sigmoid().unflatten(-1, (self.num_heads, -1))

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        x, q, k, v, log_decay, segments = tokens
        rate = self.rates(x)
        erase_key = unit(wide(k) * self.erase_scale, NORM_EPS)
        write_key = k * (1 + (rate - 1) * self.mix)
        if log_decay is not None:
            log_decay = log_decay.clamp(min=FORGET / 2)  # a gate that closes is no document's end
        log_decay = forget_at_starts(log_decay, segments, like=q)
        call = q, write_key, v, erase_key, rate, log_decay, state
        backend = "recurrent" if q.shape[1] == 1 else self.choose(v.device, v.dtype).backend
        if backend == "recurrent":
            return recurrent_rwkv7(*call)
        return self.chunked(*call, chunk=self.tokens_at_once(v))

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        """The mean of e over channels."""
        return {"step_size": self.rates(tokens.x).mean(-1)}

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        """None. fla's chunk_dplr_delta_rule computes the same, but not where gates close: 16 tokens whose log decays
        add up to less than -88 overflow its products, and three documents that begin among them are enough."""
        return {}

    def flops_per_token(self, seq_len: int) -> int:
        """Four products with the memory (look up, erase, write, read), and the rate's projections."""
        products = self.num_heads * 8 * self.key_dim * self.value_dim
        return products + 2 * (self.bottleneck.weight.numel() + self.expansion.weight.numel())
