"""gamma: how fast the past fades. (Called decay in code, because `weights` means parameters there.)

A decay turns the layer's input into natural logarithms of |gamma|, <= 0, float32 or wider, and the signs of gamma, +1
or -1, or None where all are positive. Its `kind` says of what shape the logarithms are:

    none      None: nothing fades
    head      [B, T, H]
    channel   [B, T, H, K]: every channel of the keys (after the feature map) fades at its own rate
    signed    [B, T, H], as are the signs, which no other kind has

How fast the past fades at the start is what each source has published: half-lives from 22 to 2,800 tokens (fixed), of
16 (channel), of 10 in the median (scalar, channel_rate). `half_lives`, the shortest and the longest in tokens, is one
start for all that learn it, where x says nothing: RetNet's, say, [22, 2840] (`spread`).
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.linear import read
from models.parts.precision import sum_dtype, wide
from models.parts.sizes import Sizes

CHOICES = {  # kind: the decays of conf/decay that are of it, which is what a user can choose
    "none": ("none",),
    "head": ("fixed", "scalar", "sigmoid"),
    "channel": ("channel", "slow_channel", "channel_rate"),
    "signed": ("signed",),
}


class Rates(NamedTuple):
    """A log decay per channel that is not made yet: kernels make it where they read it.

        log gamma = -exp(log_rate) softplus(raw + bias)

    raw [B, T, H, K], in the dtype of products; bias [H K]; log_rate [H].
    """

    raw: Tensor
    bias: Tensor
    log_rate: Tensor

    def made(self) -> Tensor:
        """[B, T, H, K]."""
        rate = wide(self.log_rate).exp().unsqueeze(-1)
        return -rate * F.softplus(wide(self.raw) + self.bias.unflatten(0, self.raw.shape[2:]))


class Decay(nn.Module):
    """What all decays share. reads: the layers that act on its input, if it takes no more of it than they `read`."""

    kind: str
    reads: ClassVar[tuple[str, ...]] = ()

    def unmade(self, x: Tensor) -> Rates | None:
        """What forward would make, left to whom it is for; None where it has another form."""
        return None

    def flops_per_token(self) -> int:
        return 0


class NoDecay(Decay):
    """gamma = 1: every pair counts the same for ever."""

    kind = "none"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> tuple[None, None]:
        return None, None


class FixedDecay(Decay):
    """One gamma per head, the same for all tokens (RetNet, Sun et al. 2023, section 3.1): of the n-th of H heads

    gamma_n = 1 - 2^(-5 - 7 n / (H - 1)) ,    half-lives from 22 to 2,800 tokens; 2^-5 for a single head.

    `shortest` and `longest` are the exponents, 5 and 12. (The paper's own are 5 to 5 + H - 1, which longest=None is;
    these are its 8 heads', whatever H is.)
    """

    kind = "head"
    log_decay: Tensor

    def __init__(self, sizes: Sizes, shortest: float = 5.0, longest: float | None = 12.0) -> None:
        super().__init__()
        longest = shortest + sizes.num_heads - 1 if longest is None else longest
        if not 0 < shortest <= longest:
            raise ValueError(f"decay.shortest={shortest} must be positive and at most decay.longest={longest}")
        self.exponents = (shortest, longest, sizes.num_heads)
        self.register_buffer("log_decay", self.exactly(torch.float32))

    def exactly(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """log gamma [H], computed in sum_dtype."""
        exponents = torch.linspace(*self.exponents, dtype=sum_dtype(torch.device(device)), device=device)
        return torch.log1p(-torch.exp2(-exponents)).to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        dtype, log_decay = wide(x).dtype, self.log_decay
        if dtype != torch.float32 or log_decay.dtype != dtype:  # a cast of the model brings no digits back
            log_decay = self.exactly(dtype, x.device)
        return log_decay.expand(*x.shape[:2], -1), None


class ScalarDecay(Decay):
    """One gamma per head and token, from the data (Mamba-2, Dao and Gu 2024; Gated DeltaNet, Yang et al. 2025):

        log gamma_t = -rate * softplus(x_t W + bias) ,    rate = exp(log_rate) > 0

    At the start rate is uniform in [1, 16] and softplus(bias) log-uniform in `step_range`, as published. `rate_range`:
    other bounds than 1 and 16; Gated DeltaNet's published code has 0 and 16. Or `half_lives` says how the heads begin
    (spread), and step_range has no effect.
    """

    kind = "head"
    reads = ("projection",)

    def __init__(
        self,
        sizes: Sizes,
        step_range: tuple[float, float] = (0.001, 0.1),
        rate_range: tuple[float, float] = (1.0, 16.0),
        half_lives: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        low, high = _checked(step_range)
        if not 0 <= rate_range[0] < rate_range[1]:
            raise ValueError(f"decay.rate_range={tuple(rate_range)} must be two rising numbers, none negative")
        self.projection = nn.Linear(sizes.hidden_size, sizes.num_heads, bias=False)
        log_rate, bias = _rates(sizes.num_heads, *rate_range), _biases(sizes.num_heads, low, high)
        if half_lives is not None:
            bias = _biases_of(spread(half_lives, sizes.num_heads, 1), log_rate)
        self.log_rate, self.bias = log_rate, bias

    def steps(self, log_decay: Tensor) -> Tensor:
        """softplus(..) of log gamma, which is what Mamba-2 writes with."""
        return log_decay / -wide(self.log_rate).exp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return -wide(self.log_rate).exp() * F.softplus(wide(read(self.projection, x)) + self.bias), None

    def flops_per_token(self) -> int:
        return 2 * self.projection.weight.numel()


class SigmoidDecay(Decay):
    """One gamma per head and token, from the data, without a rate (MesaNet, von Oswald et al. 2025; the Forgetting
    Transformer, Lin et al. 2025): gamma = sigmoid(x_t W + bias), 1/2 in the middle at the start.
    """

    kind = "head"
    reads = ("projection",)

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.projection = nn.Linear(sizes.hidden_size, sizes.num_heads)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.logsigmoid(wide(read(self.projection, x))), None

    def flops_per_token(self) -> int:
        return 2 * self.projection.weight.numel()


class ChannelDecay(Decay):
    """One gamma per key channel and token, from the data by a bottleneck of `rank` (GLA, Yang et al. 2024, section
    4.4):

        log gamma_t = logsigmoid(x_t W_1 W_2 + bias) / temperature

    Dividing by `temperature` keeps the memory long: at the start gamma is sigmoid(0)^(1/16) = 0.96 in every channel. Or
    the bias does, where it starts at `bias` (None: around 0), or at the heads' `half_lives`.
    """

    kind = "channel"
    reads = ("projection",)

    def __init__(
        self,
        sizes: Sizes,
        rank: int = 16,
        temperature: float = 16.0,
        bias: float | None = None,
        half_lives: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if bias is not None and half_lives is not None:
            raise ValueError(
                f"decay.half_lives={[*half_lives]} sets the bias, as does decay.bias={bias}; leave one out"
            )
        if rank < 1:
            raise ValueError(f"decay.rank={rank} must be at least 1")
        if temperature <= 0:
            raise ValueError(f"decay.temperature={temperature} must be positive")
        self.temperature = temperature
        self.heads = (sizes.num_heads, sizes.key_dim)
        self.projection = nn.Linear(sizes.hidden_size, rank, bias=False)
        self.expansion = nn.Linear(rank, sizes.num_heads * sizes.key_dim)
        if bias is not None:
            nn.init.constant_(self.expansion.bias, bias)
        if half_lives is not None:
            fading = temperature * spread(half_lives, *self.heads)  # -logsigmoid(bias)
            if fading.max() > MOST_FADING:
                raise ValueError(
                    f"decay.half_lives={[*half_lives]} can't begin with decay.temperature={temperature}: temperature "
                    f"over the shortest is to be at most {MOST_FADING / math.log(2):.0f}"
                )
            self.expansion.bias = nn.Parameter(-torch.expm1(fading).log().flatten().float())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        logits = wide(self.expansion(read(self.projection, x))).unflatten(-1, self.heads)
        return F.logsigmoid(logits) / self.temperature, None

    def flops_per_token(self) -> int:
        return 2 * (self.projection.weight.numel() + self.expansion.weight.numel())


class ChannelRateDecay(Decay):
    """One gamma per key channel and token, by a rate per head and a bottleneck (Kimi Linear 2025, section 3, and its
    published layer):

        log gamma_t = -rate * softplus(x_t W_1 W_2 + bias) ,    rate = exp(log_rate) > 0

    `rank` is the bottleneck's, None for V. At the start rate is uniform in [1, 16] and softplus(bias) log-uniform in
    `step_range`, of every channel by itself: half-lives of 10 tokens in the median and of 0.6 for the fastest
    hundredth, where the biases alone are at work and ChannelDecay has 16 for all. Or `half_lives` says how the heads
    begin, all channels of one alike, and step_range has no effect.

    `lower_bound`, a negative number, is the least that log gamma can be; its form is then, as in fla's layer,

        log gamma_t = lower_bound * sigmoid(rate (x_t W_1 W_2 + bias)) ,    rate 1 at the start .
    """

    kind = "channel"
    reads = ("projection",)

    def __init__(
        self,
        sizes: Sizes,
        rank: int | None = None,
        step_range: tuple[float, float] = (0.001, 0.1),
        lower_bound: float | None = None,
        half_lives: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if lower_bound is not None and lower_bound >= 0:
            raise ValueError(f"decay.lower_bound={lower_bound} must be negative, or null for none")
        if lower_bound is not None and half_lives is not None:
            raise ValueError(
                f"decay.half_lives={[*half_lives]} can't stand beside decay.lower_bound={lower_bound}; leave one out"
            )
        self.lower_bound = lower_bound
        if rank is not None and rank < 1:
            raise ValueError(f"decay.rank={rank} must be at least 1, or null for the width of the values")
        low, high = _checked(step_range)
        self.heads = (sizes.num_heads, sizes.key_dim)
        rank, channels = rank or sizes.value_dim, sizes.num_heads * sizes.key_dim
        self.projection = nn.Linear(sizes.hidden_size, rank, bias=False)
        self.expansion = nn.Linear(rank, channels, bias=False)
        log_rate, bias = _rates(sizes.num_heads), _biases(channels, low, high)
        if half_lives is not None:
            bias = _biases_of(spread(half_lives, *self.heads), log_rate)
        self.log_rate, self.bias = log_rate, bias
        if lower_bound is not None:
            nn.init.zeros_(self.log_rate)

    def unmade(self, x: Tensor) -> Rates | None:
        return self._rates(x) if self.lower_bound is None else None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        rates = self._rates(x)
        if self.lower_bound is None:
            return rates.made(), None
        rate, bias = wide(self.log_rate).exp().unsqueeze(-1), self.bias.unflatten(0, self.heads)
        return self.lower_bound * (rate * (wide(rates.raw) + bias)).sigmoid(), None

    def _rates(self, x: Tensor) -> Rates:
        return Rates(self.expansion(read(self.projection, x)).unflatten(-1, self.heads), self.bias, self.log_rate)

    def flops_per_token(self) -> int:
        return 2 * (self.projection.weight.numel() + self.expansion.weight.numel())


class SignedDecay(ScalarDecay):
    """One gamma in (-1, 1) per head and token, 2 gamma' - 1 with gamma' of ScalarDecay: near 1 at the start.

    A negative gamma turns the memory around, which tracking a state needs (parity: Grazzi et al. 2025). No weights of a
    least-squares problem are negative, so memories that solve one refuse it. |gamma| stays above LEAST: below, its
    logarithm's gradient is only noise.
    """

    kind = "signed"
    LEAST = 1e-4

    def __init__(
        self,
        sizes: Sizes,
        step_range: tuple[float, float] = (0.001, 0.1),
        rate_range: tuple[float, float] = (1.0, 16.0),
    ) -> None:
        super().__init__(sizes, step_range, rate_range)  # half_lives would be those of gamma'

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gamma = 2 * super().forward(x)[0].exp() - 1
        signs = torch.where(gamma < 0, -1.0, 1.0).to(gamma.dtype)
        return gamma.abs().clamp(min=self.LEAST).log(), signs


HALF_LIVES = (0.1, 1_000_000)  # tokens: the shortest and the longest that a head can begin with
MOST_FADING = 500.0  # -logsigmoid(bias): a float32 bias of -500 is that


def spread(half_lives: tuple[float, float], num_heads: int, num_channels: int) -> Tensor:
    """-log gamma [H, K], float64: half-lives that rise from head to head in equal ratios, from the shortest to the
    longest, in tokens; a single head has the shortest. All channels of a head are alike. Raises ValueError for what is
    no range, or has numbers that no bias can give or that learn nothing.
    """
    (shortest, longest), (least, most) = half_lives, HALF_LIVES
    if not least <= shortest <= longest <= most:
        raise ValueError(
            f"decay.half_lives={[shortest, longest]} must be two numbers from {least} to {most:,}, the shortest first"
        )
    lives = torch.linspace(math.log(shortest), math.log(longest), num_heads, dtype=torch.float64).exp()
    return (math.log(2) / lives).unsqueeze(-1).expand(num_heads, num_channels)


def _checked(step_range: tuple[float, float]) -> tuple[float, float]:
    low, high = step_range
    if not 0 < low < high:
        raise ValueError(f"decay.step_range={tuple(step_range)} must be two rising positive numbers")
    return low, high


def _rates(n: int, low: float = 1.0, high: float = 16.0) -> nn.Parameter:
    """Logarithms of n rates, uniform between low and high."""
    return nn.Parameter(torch.empty(n).uniform_(low, high).clamp(min=1e-6).log())


def _biases(n: int, low: float, high: float) -> nn.Parameter:
    """Whose softplus is log-uniform between low and high."""
    step = torch.empty(n).uniform_(math.log(low), math.log(high)).exp()
    return nn.Parameter(_inverse_softplus(step))


def _biases_of(fading: Tensor, log_rate: Tensor) -> nn.Parameter:
    """[H] or [H K]: with which rate softplus(bias) is the fading [H, 1 or K]."""
    steps = fading.to(log_rate.device) / log_rate.detach().double().exp().unsqueeze(-1)
    return nn.Parameter(_inverse_softplus(steps).flatten().float())


def _inverse_softplus(step: Tensor) -> Tensor:
    return step + torch.log(-torch.expm1(-step))
