"""The residual block: a mixer and a feed-forward layer, each behind a norm.

x = x + mixer(norm(x)) ,    x = x + feed_forward(norm(x))

A feed-forward layer is a memory too. Most know what training has taught them; one learns on, and has a state as mixers
have.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import residual, swiglu
from models.mixers.layer import State
from models.mixers.mixer import Mixer
from models.parts.linear import is_its_weight, read
from models.parts.norm import RMSNorm, is_plain, unit
from models.parts.precision import product_dtype, wide
from models.regression.linear import in_place


class SwiGLU(nn.Module):
    """(silu(x W_a) * x W_b) W_c (Shazeer 2020): the memory that does not change at test time. x [B, T, D], inner width
    F.
    """

    def __init__(self, hidden_size: int, inner_size: int, num_heads: int = 1) -> None:
        super().__init__()
        self.inner_size = inner_size
        self.up = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.output = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ab = read(self.up, x)
        if is_its_weight(self.output) and swiglu.refusal(ab.device, ab.dtype) is None:  # less is kept, and written
            return swiglu.gated_output(ab, self.output.weight)
        a, b = ab.chunk(2, dim=-1)
        return self.output(F.silu(a) * b)

    def flops_per_token(self) -> int:
        return 2 * (self.up.weight.numel() + self.output.weight.numel())

    @staticmethod
    def num_params(hidden_size: int, inner_size: int, num_heads: int = 1) -> int:
        return 3 * hidden_size * inner_size


class PersistentMemory(nn.Module):
    """softmax(beta x' P_k^T) P_v, per head, then W_o: kernel regression on F learned pairs, the same for every token
    (Memory Mosaics, Zhang et al. 2025, who average x' over the past as well; the past is left to the mixer here). A
    feed-forward layer act(x W_1) W_2 is this with another activation: its weights are keys and values too.

    x' = x W_q and the keys P_k have length one in each of H heads, as in the softmax mixer; beta is learned per head,
    from sqrt(D / H). x [B, T, D]; P_k and P_v [H, F, D / H].
    """

    def __init__(self, hidden_size: int, inner_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"model.feed_forward=persistent_memory has the mixer's heads, and num_heads={num_heads} does not "
                f"divide hidden_size={hidden_size}"
            )
        self.inner_size, width = inner_size, hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.keys = nn.Parameter(F.normalize(torch.randn(num_heads, inner_size, width), dim=-1))
        self.values = nn.Parameter(torch.randn(num_heads, inner_size, width))
        self.log_beta = nn.Parameter(torch.full((num_heads,), 0.5 * math.log(width)))
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        H, _, K = self.keys.shape
        q = self.query(x).unflatten(-1, (H, K)).transpose(1, 2)
        q = unit(q, 1e-6) * wide(self.log_beta).exp().view(-1, 1, 1).to(q.dtype)
        k, v = (y.to(q.dtype).unsqueeze(0).expand(len(x), -1, -1, -1) for y in (unit(self.keys, 1e-6), self.values))
        o = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.output(o.transpose(1, 2).flatten(-2))

    def flops_per_token(self) -> int:
        return 2 * sum(w.numel() for w in (self.query.weight, self.keys, self.values, self.output.weight))

    @staticmethod
    def num_params(hidden_size: int, inner_size: int, num_heads: int) -> int:
        return 2 * hidden_size * (hidden_size + inner_size) + num_heads


class InPlace(nn.Module):
    """SwiGLU, whose W_c learns in context (models/regression/linear/in_place.py):
        (x [B, T, D], state=None, segments=None, keep=True) -> (y [B, T, D], state).

    grad_batch: tokens of a mini-batch, behind which it takes a step; the paper finds 512 and 1,024 best in contexts of
    4,096 and more. step_size: eta; None for 7 / F, as z . z grows with the inner width F (0.03 at size=tiny, where 0.1
    and 0.3 learn more slowly).  keep: whether the state is wanted.
    """

    REACH = 2  # tokens on either side of a value's own
    PIECE = 2048  # tokens of which all pairs are formed; more go by way of the state

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        num_heads: int = 1,
        grad_batch: int = 64,
        step_size: float | None = None,
    ) -> None:
        super().__init__()
        self.inner_size, self.grad_batch = inner_size, grad_batch
        self.step_size = 7 / inner_size if step_size is None else step_size
        self.up = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.output = nn.Linear(inner_size, hidden_size, bias=False)
        self.target = nn.Linear(hidden_size, hidden_size, bias=False)
        self.taps = nn.Parameter(torch.zeros(hidden_size, 2 * self.REACH + 1))

    def forward(
        self, x: Tensor, state: in_place.State | None = None, segments: Tensor | None = None, keep: bool = True
    ) -> tuple[Tensor, in_place.State | None]:
        a, b = read(self.up, x).chunk(2, dim=-1)
        z, T, reads = F.silu(a) * b, x.shape[1], []
        for start in range(0, T, self.PIECE):
            piece = slice(start, start + self.PIECE)
            known = None if segments is None else segments[:, piece]
            call = (x[:, piece], z[:, piece], self.taps, self.target, self.grad_batch, state, known)
            if T == 1:  # the definition
                found, state = in_place.recurrent_in_place(*call)
            else:
                found, state = in_place.parallel_in_place(*call, keep or start + self.PIECE < T)
            reads.append(found)
        return self.output(z) + self.step_size * torch.cat(reads, 1), state if keep else None

    def flops_per_token(self) -> int:
        """Of the definition: a value, and its product with a key, beside what SwiGLU takes."""
        return 2 * (self.up.weight.numel() + self.target.weight.numel() + 2 * self.output.weight.numel())

    def state_size(self) -> int:
        return 2 * self.output.weight.numel() + self.REACH * sum(self.output.weight.shape)

    @staticmethod
    def num_params(hidden_size: int, inner_size: int, num_heads: int = 1) -> int:
        return hidden_size * (3 * inner_size + hidden_size + 2 * InPlace.REACH + 1)


FeedForward = SwiGLU | PersistentMemory | InPlace
FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "swiglu": SwiGLU,
    "persistent_memory": PersistentMemory,
    "in_place": InPlace,
}


class Both(NamedTuple):
    """What a block whose feed-forward layer learns carries from one call to the next; others carry the mixer's."""

    mixer: State
    feed_forward: Any

    @property
    def position(self) -> Tensor:
        return self.mixer.position

    @property
    def segment(self) -> Tensor | None:
        return self.mixer.segment


class Block(nn.Module):
    """One layer of the model: (x [B, T, D], y, state, segments, keep) -> (x, y, state).

    x is the residual stream, and y [B, T, D] what is still to be added to it, None for nothing: so each sum is made in
    one pass with the norm of it. keep: whether the state after the last token is wanted; else it is None, and takes
    neither memory nor time. own: nobody else reads x, and no gradient: what comes out may take its place.
    """

    def __init__(self, hidden_size: int, mixer: Mixer, feed_forward: FeedForward, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(hidden_size, norm_eps), mixer
        self.feed_forward_norm, self.feed_forward = RMSNorm(hidden_size, norm_eps), feed_forward
        self.learns = isinstance(feed_forward, InPlace)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        state: State | Both | None = None,
        segments: Tensor | None = None,
        keep: bool = True,
        own: bool = False,
    ) -> tuple[Tensor, Tensor, State | Both | None]:
        mixed, memory = state if isinstance(state, Both) else (state, None)
        x, n = add_and_norm(x, y, self.mixer_norm, own)
        if keep or mixed is not None:
            y, mixed = self.mixer(n, mixed, segments)
        else:
            y = self.mixer.outputs(n, segments)
        x, n = add_and_norm(x, y, self.feed_forward_norm, own)
        if not self.learns:
            return x, self.feed_forward(n), mixed if keep else None
        y, memory = self.feed_forward(n, memory, segments, keep)
        return x, y, Both(cast("State", mixed), memory) if keep else None

    def emptied(self, state: State | Both) -> State | Both | None:
        """The mixer's `emptied`, and the state of a feed-forward layer that has learned nothing."""
        if not isinstance(state, Both):
            return self.mixer.emptied(state)
        mixed, memory = (
            self.mixer.emptied(state.mixer),
            in_place.entered(state.feed_forward, torch.ones_like(state.position)),
        )
        return None if mixed is None else Both(mixed, memory._replace(segment=None))

    @property
    def rings(self) -> bool:
        """Whether a sequence that lies on several devices can stay where it is (models/context.py)."""
        return self.mixer.rings and not self.learns

    def flops_per_token(self, seq_len: int) -> int:
        """Forward; the norms are left out."""
        return self.mixer.flops_per_token(seq_len) + self.feed_forward.flops_per_token()

    def state_size(self, seq_len: int) -> int:
        """Numbers held per sequence after seq_len tokens."""
        own = self.feed_forward.state_size() if isinstance(self.feed_forward, InPlace) else 0
        return self.mixer.state_size(seq_len) + own


class _Nothing(torch.autograd.Function):
    """Zeros like x that count as made of it, and hand no gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(x, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None]:
        return None, None


def nothing(x: Tensor) -> Tensor:
    """For a block's y, where nothing is to be added to x: of the dtype of an update, and with a gradient as one has, so
    that a block that torch.compile has compiled for the one is not compiled anew for the other."""
    return _Nothing.apply(x, product_dtype(x))


def add_and_norm(x: Tensor, y: Tensor | None, norm: nn.Module, own: bool = False) -> tuple[Tensor, Tensor]:
    """x + y, and its norm: by a kernel where one can, in the dtype of the products to come. own: see Block."""
    if y is None:
        return x, norm(x)
    if is_plain(norm) and norm.eps is not None and residual.refusal(x.device, x.dtype, x.shape[-1]) is None:
        return residual.add_and_norm(x, y, norm.weight, norm.eps, product_dtype(x), own)
    x = x + y
    return x, norm(x)


def feed_forward(
    kind: str,
    hidden_size: int,
    mixer: Mixer,
    inner_size: int | None = None,
    grad_batch: int | None = None,
    step_size: float | None = None,
) -> FeedForward:
    """The feed-forward layer of a block with this mixer; without an inner size, of the derived one. Raises ValueError
    as own_settings does."""
    settings = own_settings(kind, grad_batch, step_size)
    inner = inner_size or derived_inner_size(kind, hidden_size, mixer.num_heads, mixer.num_params)
    return FEED_FORWARDS[kind](hidden_size, inner, mixer.num_heads, **settings)


def own_settings(kind: str, grad_batch: int | None, step_size: float | None) -> dict[str, Any]:
    """Those that are given of a layer that learns. Raises ValueError for a kind that isn't there, and for such settings
    where another kind is."""
    if kind not in FEED_FORWARDS:
        raise ValueError(f"model.feed_forward={kind} is not one of {', '.join(FEED_FORWARDS)}")
    given = {"grad_batch": grad_batch, "step_size": step_size}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in settings.items() if kind != "in_place" else ():
        raise ValueError(
            f"model.feed_forward_{name}={value} is of model.feed_forward=in_place, and this is {kind}; leave it out"
        )
    return settings


def derived_inner_size(kind: str, hidden_size: int, num_heads: int, mixer_params: int) -> int:
    """The inner width F with which a block has 12 D^2 parameters (4 D^2 attention and 8 D^2 feed-forward, the
    transformer's), whatever its mixer and its feed-forward layer.

    A multiple of D / 16, the widths that tile well, which keeps every block within 0.8 % of 12 D^2 plus its norms.
    Raises ValueError if the mixer alone has more than that.
    """
    count = FEED_FORWARDS[kind].num_params
    step, none = max(1, hidden_size // 16), count(hidden_size, 0, num_heads)
    each = count(hidden_size, 1, num_heads) - none
    inner = round((12 * hidden_size**2 - mixer_params - none) / (each * step)) * step
    if inner < step:
        raise ValueError(
            f"the mixer alone has {mixer_params:,} parameters, and a block 12 hidden_size^2 = {12 * hidden_size**2:,}: "
            "nothing is left for the feed-forward layer; make the mixer smaller or set model.feed_forward_size"
        )
    return inner
