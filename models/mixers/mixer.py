"""The shell that every mixer shares: pairs -> regressor -> read-out.

    q, k, v = projections of x, then a short convolution, an activation, a norm, rotary positions, a feature map
    o       = regressor(q, k, v)    the inner model, fitted to the pairs and read at the queries (models/regression)
    y       = (norm(o) * gate(x)) W_o

A mixer is a recipe: its YAML says which of these steps it has, and which decay, features and regressor go in. What
cannot go together is refused here, when it is built.

Shapes: B batch, T tokens, D model width, H heads, G key-value heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import pairs as kernels
from models.kernels import read_out
from models.mixers.layer import Layer, State, Tails, check_choice, positions_of
from models.parts.convolution import Shift, ShortConvolution
from models.parts.decay import CHOICES, Decay
from models.parts.features import FeatureMap, Identity
from models.parts.linear import Products, is_its_weight, one_product, read
from models.parts.norm import RMSNorm, is_plain, sum_to_one, unit
from models.parts.precision import product_dtype
from models.parts.rotary import frequencies, rotate
from models.parts.sizes import Sizes
from models.regression.regressor import Choice, Regressor, Tokens

CONVOLVED = ("qkv", "k")
PAIRS = ("same", "shift")
ACTIVATIONS = {"none": None, "silu": F.silu}
GATES = {"none": None, "silu": F.silu, "sigmoid": torch.sigmoid}
NORMS = ("none", "l2", "rms")
FEATURE_NORMS = {"none": None, "l2": unit, "sum": sum_to_one}
BACKENDS = ("auto", "triton", "torch")

Gate = Tensor | read_out.Gate  # made, or left to what reads it


class Mixer(Layer):
    """(x [B, T, D], state=None, segments=None) -> (y [B, T, D], state).

    T = 1 with a state is decoding; any split of a sequence into calls gives the same outputs. `segments` [B, T] numbers
    the documents of packed rows, which behave as separate sequences; a document may go on in the next call, under the
    same number.

    num_heads, num_kv_heads, key_dim, value_dim: H, G (default H), K and V (default D / H).
    num_key_heads: of queries and keys, each for as many heads of values (grouped value heads, Qwen3-Next; default H).
    conv_size: width of the short convolution, 0 for none.
    conv_on: qkv | k (on the keys alone), what it acts on.
    pairs: same | shift, which key a token's value goes with: its own, or the previous token's, which makes bigrams of
        the pairs (H3, Fu et al. 2022, section 3.1; the first token of a document has the key zero).
    activation: none | silu, after it.
    qk_norm: none | l2 (length one) | rms (length sqrt(K), with learned weights per channel).
    rotary: the base of the positions, or None.  rotary_channels: how many of the K channels turn (default K).
    feature_norm: after the feature map, none | l2 (length one: a step of size 1 stays stable, whatever the features) |
        sum (one in sum, for positive features; Schlag et al. 2021).
    output_norm: RMS norm of each head's output.
    output_norm_eps: what that norm adds to the mean square, of reads scaled by 1 / sqrt(K), as fla and Qwen3-Next scale
        their queries. No read is scaled here, so K times as much is added (K as wide as the features). None: norm_eps,
        added to the read as it is.
    output_gate: none | silu | sigmoid, of a projection of x.
    output_projection: false leaves the heads side by side, [B, T, H V], to whoever projects them.
    decay, features, regressor: constructors, called with the sizes that they need.
    pairs_backend: auto | triton | torch, what makes queries, keys and values of a projection: the kernels
        (models/kernels/pairs), which auto takes on a GPU where they can, or the PyTorch form.
    """

    own_queries: ClassVar[bool] = True  # whether queries have a projection of their own
    num_tails: ClassVar[int] = 1  # of `_along`

    def __init__(
        self,
        hidden_size: int,
        layer_index: int,
        regressor: Callable[..., Regressor],
        decay: Callable[..., Decay],
        features: Callable[..., FeatureMap],
        num_heads: int,
        num_kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 0,
        conv_on: str = "qkv",
        pairs: str = "same",
        activation: str = "none",
        qk_norm: str = "none",
        rotary: float | None = None,
        feature_norm: str = "none",
        output_norm: bool = False,
        output_gate: str = "none",
        output_projection: bool = True,
        norm_eps: float = 1e-6,
        output_norm_eps: float | None = None,
        num_key_heads: int | None = None,
        rotary_channels: int | None = None,
        pairs_backend: str = "auto",
    ) -> None:
        super().__init__()
        H, G = num_heads, num_kv_heads or num_heads
        check_choice("conv_on", conv_on, CONVOLVED)
        check_choice("pairs", pairs, PAIRS)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("output_gate", output_gate, GATES)
        check_choice("qk_norm", qk_norm, NORMS)
        check_choice("feature_norm", feature_norm, FEATURE_NORMS)
        check_choice("pairs_backend", pairs_backend, BACKENDS)
        if (key_dim is None or value_dim is None) and hidden_size % H:
            raise ValueError(
                f"num_heads={H} does not divide hidden_size={hidden_size}; set key_dim and value_dim, or other heads"
            )
        if H % G:
            raise ValueError(f"num_kv_heads={G} does not divide num_heads={H}")
        if H % (num_key_heads or H) or (num_key_heads and (G != H or not self.own_queries)):
            raise ValueError(
                f"num_key_heads={num_key_heads}: it must divide num_heads={H}, and stand beside no num_kv_heads and "
                "not in a mixer whose queries are the keys; leave it out for as many as num_heads"
            )
        self.values_per_key = H // (num_key_heads or H)
        K, V = key_dim or hidden_size // H, value_dim or hidden_size // H
        if rotary is not None and K % 2:
            raise ValueError(f"key_dim={K} must be even for rotary positions")
        if rotary_channels is not None and (rotary is None or rotary_channels % 2 or not 0 < rotary_channels <= K):
            raise ValueError(
                f"rotary_channels={rotary_channels} must be even, at most key_dim={K}, and stand beside a rotary base"
            )
        self.layer_index = layer_index
        self.num_heads, self.num_kv_heads, self.key_dim, self.value_dim = H, G, K, V
        self.activation, self.gate = ACTIVATIONS[activation], GATES[output_gate]
        self.rotary, self.rotary_channels, self.norm_eps = rotary, rotary_channels, norm_eps
        self.words = (activation, output_gate, qk_norm)  # what the kernels are told
        self.pairs_backend = pairs_backend

        sizes = Sizes(hidden_size, H, G, K, V)
        self.features = features(sizes)
        sizes = sizes._replace(key_dim=self.features.width)
        self.decay, self.regressor = decay(sizes), regressor(sizes)
        self._check_recipe()
        self.regressor.decay_kind = self.decay.kind
        n = self.regressor.pairs_per_token
        r = self.values_per_key
        self.sizes = [H // r * K if self.own_queries else 0, n * G // r * K, n * G * V]  # q, k, v
        self.projection = nn.Linear(hidden_size, sum(self.sizes) + (H * V if self.gate else 0), bias=False)
        self._build_along(conv_size, conv_on)
        self.shift = Shift(self.sizes[1]) if pairs == "shift" else None
        to_unit = partial(unit, eps=norm_eps) if qk_norm == "l2" else None
        self.q_norm = RMSNorm(K, norm_eps) if qk_norm == "rms" else to_unit
        self.k_norm = RMSNorm(K, norm_eps) if qk_norm == "rms" else to_unit
        same = feature_norm == qk_norm and isinstance(self.features, Identity)  # it is that long already
        self.feature_norm = None if same else FEATURE_NORMS[feature_norm]
        self.read_eps = norm_eps if output_norm_eps is None else output_norm_eps * self.features.width
        self.output_norm = RMSNorm(V, self.read_eps) if output_norm else None
        self.output = nn.Linear(H * V, hidden_size, bias=False) if output_projection else None

    def _build_along(self, conv_size: int, conv_on: str) -> None:
        """What `_along` has parameters for."""
        self.conv_on, channels = conv_on, {"qkv": sum(self.sizes), "k": self.sizes[1]}[conv_on]
        self.convolution = ShortConvolution(channels, conv_size) if conv_size > 1 else None

    def _check_recipe(self) -> None:
        """Raises ValueError for parts that cannot go together."""
        name = type(self.regressor).__name__
        if self.num_kv_heads != self.num_heads and not self.regressor.grouped_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: {name} has a memory per head; "
                f"only num_kv_heads={self.num_heads} is possible"
            )
        if self.decay.kind not in self.regressor.accepts_decay:
            choices = [choice for kind in self.regressor.accepts_decay for choice in CHOICES.get(kind, (kind,))]
            raise ValueError(
                f"{name} cannot have a {type(self.decay).__name__}; possible choices of decay: {', '.join(choices)}"
            )
        if self.regressor.needs_positive_features and not self.features.positive:
            raise ValueError(
                f"regressor.normalizer=true divides by phi(q) . phi(k), which {type(self.features).__name__} features "
                "let vanish or be negative; choose positive ones, or normalizer=false"
            )

    def forward(self, x: Tensor, state: State | None = None, segments: Tensor | None = None) -> tuple[Tensor, State]:
        if state is not None and segments is not None:
            state = self.enter(state, segments[:, 0])
        tails = (None,) * (self.num_tails + 1) if state is None else state.tails
        memory, turn = (None, None) if state is None else (state.memory, state.turn)
        positions = positions_of(x, None if state is None else state.position, segments)

        q, k, v, gate, tails, seen = self._pairs(x, positions, tails, segments)
        n = self.regressor.pairs_per_token
        q, k = self._features(q, positions), self._features(k, _each(positions, n))
        log_decay, signs = self._log_decay(seen if self.decay.reads else x, v)
        if signs is not None:
            turn = _turns(signs, turn)
            q, k = q * turn.unsqueeze(-1), k * _each(turn, n).unsqueeze(-1)

        seen = seen if self.regressor.reads else x
        o, memory = self.regressor(Tokens(seen, q, k, self._written(v, log_decay), log_decay, segments), memory)
        del q, k, seen, log_decay  # of a long prompt they are as large as what is to come
        o = self._leave(x, o, v, gate)
        if self.output is not None:
            o = read(self.output, o)
        segment = segments[:, -1] if segments is not None else None if state is None else state.segment
        turn = None if turn is None else turn[:, -1]
        return o, State(memory, tails, positions[:, -1] + 1, segment, turn)

    def _pairs(
        self, x: Tensor, positions: Tensor, tails: Tails, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Gate | None, Tails, Any]:
        """What is made of a product with x: q [B, T, H, K], k [B, T n, G, K], v [B, T n, G, V], at their norms and
        turned; the gate [B, T, H V]; what the next call needs to go on; x, or what stands for it (Products).
        """
        if self.choose(x.device, product_dtype(x)).backend == "triton":
            return self._accelerated(x, positions, tails)
        pairs, gate, n = self.projection(x), None, self.regressor.pairs_per_token
        if self.gate is not None:
            pairs, gate = pairs.split([sum(self.sizes), self.num_heads * self.value_dim], dim=-1)
            gate = self.gate(gate)
        last_key = tails[-1]
        (q, k, v), tails = self._along(pairs, tails[:-1], segments)
        if self.shift is not None:
            k, last_key = self.shift(k, last_key, segments)
        q, k, v = (
            y.unflatten(-1, (m, -1, width)).flatten(1, 2)  # [B, T, H, K], [B, T n, G, K], [B, T n, G, V]
            for y, m, width in ((q, 1, self.key_dim), (k, n, self.key_dim), (v, n, self.value_dim))
        )
        if self.values_per_key > 1:
            q, k = (y.repeat_interleave(self.values_per_key, dim=2) for y in (q, k))
        q, k = self._address(q, positions, self.q_norm), self._address(k, _each(positions, n), self.k_norm)
        return q, k, v, gate, (*tails, last_key), x

    def _accelerated(
        self, x: Tensor, positions: Tensor, tails: Tails
    ) -> tuple[Tensor, Tensor, Tensor, Gate | None, Tails, Any]:
        """`_pairs` by the kernels, and one product for everything that is linear in x: thin ones cost as much as wide
        ones, for each reads x, and adds to its gradient.
        """
        layers = self.layers_of_input()
        gates = layers[1:] if all(is_its_weight(layer) for layer in layers) else ()
        projected = one_product(x, layers) if gates else read(self.projection, x)
        K, V, frequency = self.key_dim, self.value_dim, None
        if self.rotary is not None:
            frequency = frequencies((self.rotary_channels or K) // 2, self.rotary, x.device)
        weight = None if self.convolution is None else self.convolution.weight
        q_scale, k_scale = (norm.weight if isinstance(norm, RMSNorm) else None for norm in (self.q_norm, self.k_norm))
        call = kernels.Call(projected, positions, tails[0], weight, q_scale, k_scale, frequency)
        heads = (self.sizes[0] // K, self.sizes[1] // K, self.sizes[2] // V, 0 if self.gate is None else self.num_heads)
        activation, gating, norm = self.words
        later = self.gate is not None and self._reads_gate(projected)
        words = (activation, kernels.LATER if later else gating, norm)
        made = kernels.pairs(call, kernels.Recipe(*heads, K, V, self.conv_on, *words, self.norm_eps))
        (q, k, v), after, gate, tail = made[:3], 3, None, None
        if self.gate is not None:
            given, after = made[after], after + 1
            gate = self._later(projected, given, gating) if later else given.flatten(-2)
        seen: Any = x
        if gates:
            seen, after = Products(gates, made[after]), after + 1
        if self.convolution is not None:
            tail = made[after]
        if self.values_per_key > 1:
            q, k = (y.repeat_interleave(self.values_per_key, dim=2) for y in (q, k))
        k, v = (y.unflatten(2, (self.regressor.pairs_per_token, -1)).flatten(1, 2) for y in (k, v))
        return q, k, v, gate, (tail, None), seen

    def layers_of_input(self) -> tuple[nn.Linear, ...]:
        """The projection, and the layers of decay and memory that act on x, as far as they are named (`reads`)."""
        found = [getattr(owner, name) for owner in (self.decay, self.regressor) for name in owner.reads]
        return (self.projection, *(layer for layer in found if layer is not None))

    def choose(self, device: torch.device, dtype: torch.dtype) -> Choice:
        """What makes q, k and v of a row of this dtype: pairs_backend, or what `auto` finds. Raises ValueError for
        kernels that were asked for and can't run.
        """
        refusal = self._refusal(device, dtype)
        if self.pairs_backend == "triton" and refusal is not None:
            raise ValueError(f"pairs_backend=triton can't run {type(self).__name__} here: {refusal}")
        if self.pairs_backend != "auto":
            return Choice(self.pairs_backend, "as asked")
        if device.type != "cuda":
            return Choice("torch", "no GPU")
        return Choice("triton", "") if refusal is None else Choice("torch", f"triton: {refusal}")

    def _refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the kernels can't make the pairs, or None if they can."""
        if any(getattr(type(self), name) is not getattr(Mixer, name) for name in ("_along", "_address")):
            return f"{type(self).__name__} makes its pairs in a way of its own"
        if self.shift is not None:
            return "the kernels have no pairs=shift"
        width = 0 if self.convolution is None else self.convolution.width
        return kernels.refusal(device, dtype, max(self.key_dim, self.value_dim), width)

    def _along(self, pairs: Tensor, tails: Tails, segments: Tensor | None) -> tuple[tuple[Tensor, ...], Tails]:
        """What acts along the tokens before any norm: (q, k, v) [B, T, *], and what the next call needs to go on."""
        (tail,) = tails
        if self.convolution is not None and self.conv_on == "qkv":
            pairs, tail = self.convolution(pairs, tail, segments)
        q, k, v = pairs.split(self.sizes, dim=-1)
        if self.convolution is not None and self.conv_on == "k":
            k, tail = self.convolution(k, tail, segments)
        if self.activation is not None:
            q, k, v = (self.activation(y) for y in (q, k, v))
        return (q, k, v), (tail,)

    def _address(self, x: Tensor, positions: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Queries or keys at their norm, and turned. x [B, T, H, K]."""
        if norm is not None:
            x = norm(x)
        return x if self.rotary is None else rotate(x, positions, self.rotary, self.rotary_channels)

    def _log_decay(self, x: Any, v: Tensor) -> tuple[Any, Tensor | None]:
        """The log decay and its signs. Where gradients are wanted the regressor's kernels may be left to make it; who
        looks inside a memory wants none, and finds the log decay itself.
        """
        left = self.decay.unmade(x) if torch.is_grad_enabled() and self.regressor.makes_decay(v) else None
        return self.decay(x) if left is None else (left, None)

    def _features(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys as the memory sees them, [B, T, H, width]."""
        x = self.features(x, positions)
        return x if self.feature_norm is None else self.feature_norm(x, self.norm_eps)

    def _written(self, v: Tensor, log_decay: Tensor | None) -> Tensor:
        """Values as the memory gets them, [B, T n, H, V]."""
        return v

    def _later(self, row: Tensor, link: Tensor, activation: str) -> read_out.Gate:
        """The gate, to be made of a row's last columns; without gradients of a copy, so that a prompt's row is not kept
        until then, four times as wide."""
        first, width = sum(self.sizes), self.num_heads * self.value_dim
        if torch.is_grad_enabled():
            return read_out.Gate(row, link, first, activation)
        return read_out.Gate(row.narrow(-1, first, width).contiguous(), link, 0, activation)

    def _reads_gate(self, row: Tensor) -> bool:
        """Whether the kernels of the read-out make the gate of a row."""
        if any(getattr(type(self), name) is not getattr(Mixer, name) for name in ("_leave", "_read_out")):
            return False
        plain = self.output_norm is None or is_plain(self.output_norm)
        return plain and read_out.refusal(row.device, row.dtype, self.value_dim) is None

    def _leave(self, x: Tensor, o: Tensor, v: Tensor, gate: Gate | None) -> Tensor:
        """What was read, [B, T, H, V], at its norm and gated, [B, T, H V]."""
        if isinstance(gate, read_out.Gate):
            weight = None if self.output_norm is None else self.output_norm.weight
            return read_out.read_out(o, gate, weight, self.read_eps)
        o = self._read_out(o).to(x.dtype)
        return o if gate is None else o * gate

    def _read_out(self, o: Tensor) -> Tensor:
        """[B, T, H, V] to [B, T, H V], each head at its norm."""
        return (o if self.output_norm is None else self.output_norm(o)).flatten(-2)

    def recall(self, q: Tensor, x: Tensor, positions: Tensor, state: State | None) -> Tensor:
        """What the memory holds at queries from elsewhere, [B, T, H V]; it learns nothing. No tokens of its own, they
        are not convolved, and nothing gates what is read.

        q [B, T, H K], as a projection leaves them; x [B, T, D], what they were projected from; positions [B, T]; state:
        after the last call, None for an empty memory.
        """
        q = (q if self.activation is None else self.activation(q)).unflatten(-1, (self.num_heads, self.key_dim))
        q = self._features(self._address(q, positions, self.q_norm), positions)
        if state is not None and state.turn is not None:
            q = q * state.turn[:, None, :, None]
        o = self.regressor.recall(x, q, None if state is None else state.memory)
        return self._read_out(o).to(x.dtype)

    def enter(self, state: State, segment: Tensor) -> State:
        """The state as the first document of a call wants it: emptied in the rows where another document begins.
        Without segments, all is document 0.
        """
        before = torch.zeros_like(segment) if state.segment is None else state.segment
        new = before != segment
        tails = tuple(None if x is None else x.masked_fill(new.view(-1, 1, 1), 0) for x in state.tails)
        memory, position = self._forget(state.memory, new), state.position.masked_fill(new, 0)
        return State(memory, tails, position, segment, state.turn)

    def emptied(self, state: State) -> State | None:
        new = self.enter(state, torch.ones_like(state.position))
        return new._replace(segment=None, turn=None if new.turn is None else torch.ones_like(new.turn))

    def _forget(self, memory: Any, rows: Tensor) -> Any:
        """The memories of the given rows emptied."""
        return self.regressor.forget(memory, rows)

    @property
    def rings(self) -> bool:
        """Whether it needs no more of the tokens before than their positions and, from other processes, their pairs."""
        return type(self) is Mixer and self.regressor.rings and self.convolution is None and self.shift is None

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Forward, multiply-adds counted as two: products with weights, and the regression by its definition. What is
        done element by element (convolution, norms, gates, activations) is left out, as is what a parallel form spends
        beyond the definition: MFU then can't be raised by wasting work.
        """
        products = 2 * sum(layer.weight.numel() for layer in (self.projection, self.output) if layer is not None)
        parts = self.decay.flops_per_token() + self.features.flops_per_token()
        return products + parts + self.regressor.flops_per_token(seq_len)

    def state_size(self, seq_len: int) -> int:
        """Numbers held per sequence after seq_len tokens: the memory, and the tails of convolution and shift."""
        tails = sum(c.num_channels * (c.width - 1) for c in (self.convolution, self.shift) if c is not None)
        return self.regressor.state_size(seq_len) + tails


def _each(x: Tensor, n: int) -> Tensor:
    """[B, T, *] of tokens to [B, T n, *] of their pairs."""
    return x if n == 1 else x.repeat_interleave(n, dim=1)


def _turns(signs: Tensor, turn: Tensor | None) -> Tensor:
    """The product of all signs up to each token, [B, T, H], going on from turn [B, H].

    A decay of either sign, gamma = s |gamma|, is the decay |gamma| for keys and queries that turn by 180 degrees where
    s is negative: the turns of query t and key i multiply to the signs of all tokens between them. (Rotary positions
    turn by other angles, in the same sense: gamma = |gamma| exp(i omega).)
    """
    turns = signs.cumprod(1)
    return turns if turn is None else turns * turn.unsqueeze(1)
