"""A memory and attention in one layer (Titans, Behrouz et al. 2025, section 4): what was long ago, and what is near.

Two mixers share the layer, each with a recipe of its own: a memory M, any of conf/mixer, and attention over a sliding
window, which also sees persistent pairs (regression/local/sliding_window.py). Where they stand to each other, with the
paper's equations:

    gate       26-28   o = (y ⊗ m) W_o ,    y = Attn(x) ,    m = M(x)
    layer      29-31   o = Attn(M(x)) W_o
    context    21-25   attention sees what M recalls, and M learns what attention makes of it (memory_context.py)

and y ⊗ m = norm(y) * sigma(norm(m)), each norm with a learned vector. What goes from one to the other are the heads'
outputs as they are, side by side, [B, T, H V]: a projection between them would only be followed by another, to the next
one's queries, keys and values. W_o is the layer's.

The paper writes the persistent tokens into M as well, before the first of the sequence; here M begins as its recipe
says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from models.mixers.layer import Layer, State
from models.mixers.mixer import GATES, Mixer
from models.parts.decay import Decay
from models.parts.features import FeatureMap
from models.parts.norm import RMSNorm
from models.regression.regressor import Regressor


class Product(nn.Module):
    """y ⊗ m = norm(y) * sigma(norm(m)), [B, T, width] all. kind: sigmoid | silu, what sigma is."""

    def __init__(self, width: int, kind: str, norm_eps: float) -> None:
        super().__init__()
        kinds = {name: gate for name, gate in GATES.items() if gate is not None}
        if kind not in kinds:
            raise ValueError(f"product={kind} is not one of {', '.join(kinds)}")
        self.gate = kinds[kind]
        self.attention_norm, self.memory_norm = RMSNorm(width, norm_eps), RMSNorm(width, norm_eps)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return self.attention_norm(y) * self.gate(self.memory_norm(m))


class MemoryAttention(Layer):
    """A mixer (mixer.py) of two, `memory` and `attention`. What is asked about its regressor, decay or features
    is answered for the memory; its state is theirs.
    """

    place: ClassVar[str]  # of the memory, in a few words
    memory: Mixer
    attention: Mixer
    output: nn.Linear

    def build(self, name: str, recipe: Callable[..., Mixer], hidden_size: int, layer_index: int) -> Mixer:
        """The mixer of this name, memory or attention, without its output projection. recipe: its constructor."""
        kind = getattr(recipe, "func", None)
        if not (isinstance(kind, type) and issubclass(kind, Mixer)):
            raise ValueError(f"{name}={getattr(kind, '__name__', recipe)} must be a mixer with a regressor of its own")
        mixer = recipe(hidden_size=hidden_size, layer_index=layer_index, output_projection=False)
        if name == "memory":
            mixer.regressor.function_class += f", {self.place}"
        return mixer

    @property
    def regressor(self) -> Regressor:
        return self.memory.regressor

    @property
    def decay(self) -> Decay:
        return self.memory.decay

    @property
    def features(self) -> FeatureMap:
        return self.memory.features

    @property
    def key_dim(self) -> int:
        return self.memory.key_dim

    @property
    def rotary(self) -> float | None:
        return self.memory.rotary

    @property
    def num_heads(self) -> int:
        return self.attention.num_heads

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Forward: both mixers', and W_o."""
        mixers = self.memory.flops_per_token(seq_len) + self.attention.flops_per_token(seq_len)
        return mixers + 2 * self.output.weight.numel()

    def state_size(self, seq_len: int) -> int:
        """Numbers held per sequence after seq_len tokens, by both."""
        return self.memory.state_size(seq_len) + self.attention.state_size(seq_len)

    def emptied(self, state: State) -> State | None:
        attention, memory = (m.emptied(s) for m, s in zip((self.attention, self.memory), state.memory, strict=True))
        return None if attention is None or memory is None else _both(attention, memory)


def width(mixer: Mixer) -> int:
    """Of its heads side by side."""
    return mixer.num_heads * mixer.value_dim


def check_width(name: str, mixer: Mixer, expected: int) -> None:
    if width(mixer) != expected:
        raise ValueError(
            f"{name}.num_heads={mixer.num_heads} times {name}.value_dim={mixer.value_dim} must be {expected}, as wide "
            "as what it meets"
        )


class MemoryAsGate(MemoryAttention):
    """Memory and attention side by side, the one gating the other.

    memory, attention: constructors of mixers. product: sigmoid | silu.
    """

    place = "gate of attention"

    def __init__(
        self,
        hidden_size: int,
        layer_index: int,
        memory: Callable[..., Mixer],
        attention: Callable[..., Mixer],
        product: str = "sigmoid",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.attention = self.build("attention", attention, hidden_size, layer_index)
        self.memory = self.build("memory", memory, hidden_size, layer_index)
        check_width("memory", self.memory, width(self.attention))
        self.product = Product(width(self.attention), product, norm_eps)
        self.output = nn.Linear(width(self.attention), hidden_size, bias=False)

    def forward(self, x: Tensor, state: State | None = None, segments: Tensor | None = None) -> tuple[Tensor, State]:
        attention, memory = (None, None) if state is None else state.memory
        y, attention = self.attention(x, attention, segments)
        m, memory = self.memory(x, memory, segments)
        return self.output(self.product(y, m)), _both(attention, memory)


class MemoryAsLayer(MemoryAttention):
    """Attention over what the memory has made of the tokens. memory, attention: constructors of mixers."""

    place = "layer below attention"

    def __init__(
        self, hidden_size: int, layer_index: int, memory: Callable[..., Mixer], attention: Callable[..., Mixer]
    ) -> None:
        super().__init__()
        self.memory = self.build("memory", memory, hidden_size, layer_index)
        self.attention = self.build("attention", attention, width(self.memory), layer_index)
        self.output = nn.Linear(width(self.attention), hidden_size, bias=False)

    def forward(self, x: Tensor, state: State | None = None, segments: Tensor | None = None) -> tuple[Tensor, State]:
        attention, memory = (None, None) if state is None else state.memory
        m, memory = self.memory(x, memory, segments)
        y, attention = self.attention(m, attention, segments)
        return self.output(y), _both(attention, memory)


def _both(attention: State, memory: State) -> State:
    return State((attention, memory), (), memory.position, memory.segment)
