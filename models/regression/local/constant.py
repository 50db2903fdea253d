"""Local constant regression: softmax attention and its relatives.

Problem.    Fit the memory anew for every query, the pairs near the query counting more:
                m_t = argmin_m  sum_{i<=t} w(q_t, k_i) ||v_i - m||^2 ,    w(q, k) = exp(beta q . k) .
Solution.   The weighted mean (Nadaraya 1964, Watson 1964), which is softmax attention:
                o_t = sum_i w(q_t, k_i) v_i / sum_i w(q_t, k_i) .
            With |q| and |k| fixed, w is a Gaussian kernel of their distance, exp(-beta |q - k|^2 / 2) up to a factor
            that cancels; without, it is no function of distance at all. That is what QK-norm is for (Wang, Shi and Fox
            2025, section 4.2), and 1 / beta is the bandwidth, learned.
Kernels.    Any falling function of the distance d = |q - k| will do. With x = beta d^2 / 2 (the Gaussian is e^-x):
                epanechnikov, biweight, triweight   (1 - x / n)_+^n ,  n = 1, 2, 3; the Gaussian is n = infinity
                laplace                             e^(-d sqrt(beta))
            The first three see nothing beyond d^2 = 2 n / beta. With a bandwidth for each query such that the weights
            add up to one, they are sparsemax and entmax with alpha = 1 + 1/n (Martins et al. 2022); ours is one learned
            bandwidth per head, and a pair of value 0 and weight EMPTY stands in where no key is near.
Members.    Forgetting: weights that also fade with time, w(q_t, k_i) gamma_{i+1} ... gamma_t (the Forgetting
            Transformer, Lin et al. 2025). Hopfield: the query is first replaced by the mean of the keys it finds, some
            times over (modern Hopfield networks, Ramsauer et al. 2021). Unnormalized: the sum itself, without the
            division: kernel regression that pretends its kernel matrix to be the identity (kernel.py).
State.      The pairs themselves (pairs.py). It grows with the sequence, or to W - 1 pairs with a window.
Exactness.  All forms are exact. There is no cheaper one: T queries cost T (T + 1) / 2 comparisons.

Shapes: as in pairs.py.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import attention as kernels
from models.parts.precision import working_dtype
from models.parts.sizes import Sizes
from models.regression.local.pairs import Elsewhere, Nonparametric, Pairs, View, by_head, in_blocks
from models.regression.local.ring import ring_softmax, starts
from models.regression.regressor import Tokens

POWERS = {"epanechnikov": 1, "biweight": 2, "triweight": 3}
KERNELS = ("gaussian", "laplace", *POWERS)

# The weight of nothing: a key in the middle of the kernel has weight 1. It bounds the gradient where the nearest key
# is at the very edge of the support. A hundred times less, and one early token can outweigh the gradient of
# all others: what is learned then hangs on the seed.
EMPTY = 0.1
# Added to d^2 where its root is taken: at d = 0 the Laplace kernel has a kink, and float32 knows d^2 to 1e-7.
KINK = 1e-6


def squared_distance(q: Tensor, k: Tensor) -> Tensor:
    """[..., T, K] and [..., S, K] to |q - k|^2 [..., T, S]."""
    products = q @ k.mT
    return (q.square().sum(-1, keepdim=True) + k.square().sum(-1).unsqueeze(-2) - 2 * products).clamp(min=0.0)


def kernel_weights(
    kernel: str, visible: Tensor, q: Tensor, k: Tensor, beta: Tensor, fade: Tensor | None = None, empty: float = EMPTY
) -> Tensor:
    """w(q, k) / sum w [B, H, T, S], zero for pairs that are not visible.

    q [B, H, T, K], k [B, H, S, K], beta [H, 1, 1], fade [B, H, T, S]: a further factor exp(fade). Each row adds
    up to one, with a compact kernel to less by the share of `empty`; "unnormalized" are exp(beta q . k) as they are.
    """
    if kernel in POWERS:
        n = POWERS[kernel]
        w = (1 - beta / (2 * n) * squared_distance(q, k)).clamp(min=0.0).pow(n)
        if fade is not None:
            w = w * fade.clamp(max=0.0).exp()
        w = w.masked_fill(~visible, 0.0)
        return w / (w.sum(-1, keepdim=True) + empty)
    logits = -(beta * (squared_distance(q, k) + KINK)).sqrt() if kernel == "laplace" else beta * (q @ k.mT)
    logits = (logits if fade is None else logits + fade).masked_fill(~visible, -torch.inf)
    return logits.exp() if kernel == "unnormalized" else logits.softmax(-1)


def local_constant(
    visible: Tensor,
    q: Tensor,
    q_age: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_age: Tensor | None,
    beta: Tensor,
    kernel: str = "gaussian",
) -> Tensor:
    """The weighted mean, for as many queries as are given. q_age [B, H, T, 1] and k_age [B, H, S, 1]: Pairs.age."""
    fade = None if k_age is None or q_age is None else (k_age.mT - q_age).to(k.dtype)
    return kernel_weights(kernel, visible, q, k, beta, fade) @ v


def recurrent_local_constant(
    q: Tensor, pairs: Pairs, beta: Tensor, view: View | None = None, kernel: str = "gaussian"
) -> Tensor:
    """The definition, one query at a time.

    q [B, T, H, K]; pairs k [B, S, G, K], v [B, S, G, V], age [B, S, H] or None; beta [H]; view: which pairs each query
    may use, all up to its own by default. Returns o [B, T, H, V] in the dtype of v. Computed in float32 at least.
    """
    H, dtype, view = q.shape[2], working_dtype(q, pairs.k), view or View()
    k, v = by_head(pairs.k, H, dtype), by_head(pairs.v, H, dtype)
    age = None if pairs.age is None else by_head(pairs.age.unsqueeze(-1), H, pairs.age.dtype)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            now, seen = view.past + t, view.reach(slice(t, t + 1))
            visible = view.visible(slice(t, t + 1), seen, q.device).unsqueeze(1)
            ages = (None, None) if age is None else (age[:, :, now : now + 1], age[:, :, seen])
            query = q[:, t].unsqueeze(2).to(dtype)
            o = local_constant(visible, query, ages[0], k[:, :, seen], v[:, :, seen], ages[1], of_heads(beta), kernel)
            outputs.append(o.squeeze(2))
    return torch.stack(outputs, dim=1).to(pairs.v.dtype)


def parallel_softmax(q: Tensor, pairs: Pairs, beta: Tensor, view: View | None = None) -> Tensor:
    """The same with the Gaussian kernel for all queries at once, by torch's fused kernels. Arguments as in
    recurrent_local_constant.

    Fading weights are softmax with one more channel: q . k + age, as [q, 1] . [k, age]. In half precision the age takes
    three, the second what the first has rounded off, for float32's 24 bits. That is what the kernel adds in: of a
    document that has faded by exp(-1000) it knows a weight to 6e-5. The other forms take differences in float64.
    """
    (T, H), (k, v), view = q.shape[1:3], pairs[:2], view or View()
    S, width = k.shape[1], v.shape[-1]
    q = q * beta.to(q.dtype).unsqueeze(-1)
    if pairs.age is not None:
        ages = _parts(pairs.age, k.dtype)
        k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
        q, k = torch.cat([q, q.new_ones(*q.shape[:3], ages.shape[-1])], dim=-1), torch.cat([k, ages], dim=-1)
        channels = -(-max(k.shape[-1], width) // 8) * 8  # the fused kernels want as many for all three, and by eights
        q, k, v = (F.pad(x, (0, channels - x.shape[-1])) for x in (q, k, v))
    masked = view.hides(T)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=view.visible(slice(0, T), slice(0, S), q.device).unsqueeze(1) if masked else None,
        is_causal=not masked and T > 1,
        scale=1.0,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)[..., :width]


def kernel_softmax(q: Tensor, pairs: Pairs, beta: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """The same by the kernels of this repository, which pass over what a block of queries does not see; and the
    logarithms of the sums of weights [B, T, H]. Arguments as in recurrent_local_constant, but in autocast's dtype.
    """
    kind, start = q.device.type, view.start
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else pairs.v.dtype
    q, k, v = (x.to(dtype) for x in (q * beta.to(q.dtype).unsqueeze(-1), *pairs[:2]))
    start = None if start is None else start.expand(len(q), -1)
    return kernels.attention(q, k, v, start, view.past, view.window, pairs.age)


def blocked_local_constant(q: Tensor, pairs: Pairs, beta: Tensor, view: View, kernel: str, block: int) -> Tensor:
    """The same for any kernel, `block` queries at a time. Arguments as in recurrent_local_constant."""
    H, dtype = q.shape[2], working_dtype(q, pairs.k)
    k, v = by_head(pairs.k, H, dtype), by_head(pairs.v, H, dtype)
    age = None if pairs.age is None else by_head(pairs.age.unsqueeze(-1), H, pairs.age.dtype)
    queries = (q.transpose(1, 2).to(dtype), None if age is None else age[:, :, view.past :])
    form = partial(local_constant, kernel=kernel)
    return in_blocks(form, queries, (k, v, age), (of_heads(beta),), view, block).transpose(1, 2).to(pairs.v.dtype)


def of_heads(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)


def _parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [...] in a narrower dtype without loss: [..., n] that add up to x."""
    if dtype.itemsize >= 4:
        return x.to(dtype).unsqueeze(-1)
    parts = []
    for _ in range(3):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(x.dtype)
    return torch.stack(parts, dim=-1)


class Softmax(Nonparametric):
    """The local constant estimator.

    kernel: gaussian (softmax) | laplace | epanechnikov | biweight | triweight.
    skip_first: no query uses the first pair of its document, and the one that comes with it, which has no other, reads
        zero: with pairs=shift that pair has no key.
    inverse_temperature, window, block: pairs.py. A learned beta starts at sqrt(K); a compact kernel's at n, where its
    support is the half of the sphere around the query and the weight relu(q . k)^n; the Laplace kernel's at K / 2,
    where it falls off between d = 0 and orthogonal keys as far as the Gaussian does.
    """

    accepts_decay: tuple[str, ...] = ("none",)

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        kernel: str = "gaussian",
        inverse_temperature: str | float = "learned",
        window: int | None = None,
        block: int | None = None,
        skip_first: bool = False,
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"regressor.kernel={kernel!r} is not one of {', '.join(KERNELS)}")
        first_beta = {"gaussian": sizes.key_dim**0.5, "laplace": sizes.key_dim / 2, **POWERS}[kernel]
        super().__init__(sizes, backend, inverse_temperature, window, block, first_beta)
        self.kernel, self.skipped = kernel, int(skip_first)
        if kernel != "gaussian":
            self.function_class = f"constant around q, {kernel} kernel"

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        if self.kernel != "gaussian":
            return {}
        return {"triton": kernels.refusal(device, dtype, self.key_dim, self.value_dim)}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        if backend == "triton" and self.decay_kind == "none" and self.window is None:
            return "where documents are packed, else scaled_dot_product_attention"
        if backend != "torch":
            return ""
        return "scaled_dot_product_attention" if self.kernel == "gaussian" else "blocks of queries"

    @property
    def rings(self) -> bool:
        own = type(self) in (Softmax, Forgetting, Hopfield)
        return own and self.kernel == "gaussian" and not self.skipped and self.pairs_per_token == 1

    def forward(self, tokens: Tokens, state: Any = None) -> tuple[Tensor, Any]:
        if isinstance(state, Elsewhere):
            pairs, view = self.gather(tokens, None)
            start = starts(state.position, tokens.segments, tokens.q.shape[1])
            return self.read(tokens.q, pairs, view._replace(start=start, ring=state.ring)), None
        pairs, view = self.gather(tokens, state)
        o = self.read(tokens.q, pairs, view)
        if self.skipped and view.start is not None:
            index = torch.arange(view.past, view.past + o.shape[1], device=o.device)
            o = o.masked_fill((view.start > index)[..., None, None], 0.0)
        return o, self.keep(pairs, view)

    def read(self, q: Tensor, pairs: Pairs, view: View) -> Tensor:
        """The weighted means of the pairs' values around q, [B, T, H, V]."""
        beta, backend = self.beta(q), self.choose(q.device, q.dtype).backend
        if view.ring is not None:
            return ring_softmax(q, pairs, beta, view, self.queries_at_once(q), backend == "triton")
        if backend == "recurrent":
            return recurrent_local_constant(q, pairs, beta, view, self.kernel)
        if backend == "triton" and q.shape[1] > 1 and (pairs.age is not None or view.hides(q.shape[1])):
            return kernel_softmax(q, pairs, beta, view)[0]
        if self.kernel == "gaussian":
            return parallel_softmax(q, pairs, beta, view)
        return blocked_local_constant(q, pairs, beta, view, self.kernel, self.queries_at_once(q))

    def flops_per_token(self, seq_len: int) -> int:
        """A comparison and a weighted sum with every visible pair, on average over the sequence."""
        return self.num_heads * 2 * (self.key_dim + self.value_dim) * self.num_visible(seq_len) // seq_len


class Forgetting(Softmax):
    """Softmax whose weights fade with a decay per head and token as well."""

    accepts_decay: tuple[str, ...] = ("head",)

    def state_size(self, seq_len: int) -> int:
        """The pairs, and of each how far every head has forgotten it."""
        pairs = seq_len if self.window is None else min(self.window - 1, seq_len)
        return super().state_size(seq_len) + pairs * self.num_heads


class Hopfield(Softmax):
    """Retrieval in `steps`: xi_0 = q, xi_{n+1} = the weighted mean of the keys around xi_n, and the values are read
    around the last. All queries keep to the pairs up to their own. One step is softmax.
    """

    def __init__(self, sizes: Sizes, backend: str = "auto", steps: int = 2, **settings: Any) -> None:
        super().__init__(sizes, backend, **settings)
        if steps < 1:
            raise ValueError(f"regressor.steps={steps} must be at least 1, which is softmax")
        self.steps, self.fit = steps, f"closed form, {steps} times"

    def read(self, q: Tensor, pairs: Pairs, view: View) -> Tensor:
        for _ in range(self.steps - 1):
            q = super().read(q, pairs._replace(v=pairs.k), view)
        return super().read(q, pairs, view)

    def flops_per_token(self, seq_len: int) -> int:
        """Softmax, and for every step before it a softmax over the keys."""
        earlier = 4 * self.key_dim * (self.steps - 1) * self.num_heads * self.num_visible(seq_len) // seq_len
        return super().flops_per_token(seq_len) + earlier


class UnnormalizedSoftmax(Softmax):
    """o_t = sum_{i<=t} exp(beta q_t . k_i) v_i: softmax without its denominator, which nothing then bounds. A weight
    overflows float32 at beta q . k = 88, and the sum grows with the sequence; keys of length one and an output norm
    keep it within range, subtracting a maximum does not. It is here to show what the denominator is for.
    """

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        inverse_temperature: str | float = "learned",
        window: int | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__(sizes, backend, "gaussian", inverse_temperature, window, block)
        self.kernel, self.fit = "unnormalized", "a sum"
        warnings.warn("softmax without its denominator is unstable: it grows as exp(beta |q| |k|)", stacklevel=2)
