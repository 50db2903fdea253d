"""What every regressor is: an inner model fitted to the pairs (k, v) seen so far, read at q.

    regressor(tokens, state=None) -> (o [B, T, H, V], state)

    tokens: what a call brings, token by token (Tokens below).
    state: the memory after the last token of the previous call, None at the start. It belongs to the first document of
        the call; where it does not, mixer.py has called `forget` on it.

A subclass is the last part of its chapter. It states which decays it accepts, which backends it has and why one can't
run, and counts its own parameters, operations and state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.parts.linear import Products
from models.parts.sizes import Sizes

# What a decay can be: no log_decay; one per head [B, T, H]; one per key channel [B, T, H, K]; one per head of which
# mixer.py has put the sign into q and k, which a memory may accept if turning all keys turns it and changes no more.
DECAYS = ("none", "head", "channel", "signed")
BACKENDS = ("auto", "fla", "triton", "torch", "recurrent")

# A document boundary is a decay that forgets everything: exp(FORGET) = 1.6e-28 is below the rounding of float64. In a
# cumulative sum it takes the digits of what follows (float32 resolves 64 to 4e-6), so chunked forms count it apart.
FORGET = -64.0


class Tokens(NamedTuple):
    """What a regressor is given of the tokens of a call.

    x [B, T, D]: the layer's input, from which the regressor projects its own step sizes; or the Products of
        parts/linear.py that stand for it.
    q, k [B, T, H, K] and v [B, T, H, V]: queries, keys, values. With n pairs per token k and v are [B, T n, H, *], a
        token's one after another.
    log_decay [B, T, H] or [B, T, H, K]: natural logarithm of gamma, <= 0, float32; None forgets nothing. Of a regressor
        that `makes_decay`, the Rates of parts/decay.py.
    segments [B, T]: integers, the document of each token, changing where one ends and the next begins. Documents do not
        see each other. None: one document a row.
    """

    x: Tensor | Any
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | Any | None = None
    segments: Tensor | None = None

    def each(self, function: Callable[..., Tensor], *others: Tokens) -> Tokens:
        """The function of every tensor, and of those of other calls beside it; of products where they stand for x."""
        calls = [call._replace(x=getattr(call.x, "products", call.x)) for call in (self, *others)]
        found = Tokens._make(None if x[0] is None else function(*x) for x in zip(*calls, strict=True))
        return found._replace(x=self.x._replace(products=found.x)) if isinstance(self.x, Products) else found


class Choice(NamedTuple):
    """The backend a regressor runs on, and why: a row of the table that is printed before the first step."""

    backend: str
    reason: str


class Regressor(nn.Module):
    """Base of all regressors; see the module's docstring for the contract."""

    accepts_decay: tuple[str, ...] = ("none",)
    grouped_heads: ClassVar[bool] = False  # whether k and v may have fewer heads than q
    function_class: str = "linear"  # what m can express, in the features, in a word or two
    fit: str  # how it is fitted, in a few
    weighs_values: ClassVar[bool] = True  # whether o_t = c_t + sum_i w_ti v_i with c and w that know of no value
    needs_positive_features: bool = False  # whether phi(q) . phi(k) must not be negative
    decay_kind: str = "none"  # of the recipe's decay; mixer.py sets it
    pairs_per_token: int = 1  # n
    reads: ClassVar[tuple[str, ...]] = ()  # its layers that act on x, if it takes no more of x than they `read`
    projections: ClassVar[tuple[str, ...]] = ()  # its layers that make vectors of x as the shell makes q, k and v

    def __init__(self, sizes: Sizes, backend: str = "auto") -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"regressor.backend={backend!r} is not a backend; one of {', '.join(BACKENDS)}")
        self.hidden_size, self.num_heads, self.num_kv_heads, self.key_dim, self.value_dim = sizes
        self.backend = backend

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def recall(self, x: Tensor, q: Tensor, state: Any) -> Tensor:
        """o [B, T, H, V]: what the memory that a call has left behind holds at q [B, T, H, K], the same for all tokens.
        None is an empty memory. Not all regressors can.
        """
        raise NotImplementedError

    def forget(self, state: Any, rows: Tensor) -> Any:
        """The state with the memories of the given rows (bool [B]) emptied: their next token begins a document."""
        return state.masked_fill(rows.view(-1, 1, 1, 1), 0.0)

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        """The accelerated backends this regressor has, best first: name -> why it can't run here, or None if it can."""
        return {}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        """What else there is to say about a backend: which of its kernels is taken. "" if it has one."""
        return ""

    def choose(self, device: torch.device, dtype: torch.dtype) -> Choice:
        """The backend for this device and compute dtype. `auto` takes the first accelerator that is right here, else
        `torch`; one that was named outright and can't run is a ValueError that says why.
        """
        refusals = self.accelerators(device, dtype)
        if self.backend not in ("auto", "torch", "recurrent"):
            refusal = refusals.get(self.backend, f"{type(self).__name__} has no such kernel")
            if refusal is not None:
                raise ValueError(f"regressor.backend={self.backend} can't run {type(self).__name__} here: {refusal}")
        name, reasons = self.backend, ["as asked"]
        if name == "auto":
            possible = [name for name, why in refusals.items() if why is None and device.type == "cuda"]
            name = possible[0] if possible else "torch"
            said = [f"{name}: {why}" for name, why in refusals.items() if why]
            reasons = [] if possible else said if device.type == "cuda" else ["no GPU"] if refusals else []
        return Choice(name, "; ".join(filter(None, [*reasons, self.route(name, device, dtype)])))

    def makes_decay(self, v: Tensor) -> bool:
        """Whether for these values it takes for a log decay the Rates that it is made of."""
        return False

    def diagnostics(self) -> dict[str, Tensor]:
        """Of the last forward pass, what is worth a column in metrics.csv: numbers, as tensors on the device."""
        return {}

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        """What it draws from the tokens of a call or has learned, in the terms of its chapter: step_size, momentum,
        write_weight, ... [B, T n or T, H], bandwidth [H]. {} for none. For who looks inside (training/probe.py).
        """
        return {}

    def flops_per_token(self, seq_len: int) -> int:
        """Multiply-adds counted as two, forward only, of the definition (mixer.py adds the projections it owns)."""
        raise NotImplementedError

    def recall_flops_per_token(self) -> int:
        """Of recall."""
        raise NotImplementedError

    def state_size(self, seq_len: int) -> int:
        """Numbers held after seq_len tokens, per sequence."""
        raise NotImplementedError

    @property
    def rings(self) -> bool:
        """Whether the pairs of the tokens before may lie on other processes (local/ring.py)."""
        return False

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())
