"""A memory that writes into attention's context, and learns from what comes out (MAC; Titans, Behrouz et al. 2025,
section 4.1, equations 21 to 25).

A document falls into segments of L tokens, and attention keeps to the segment; what was before, the memory tells:

        h_t = M_s(x_t W_Q)                                      s: the last token of the segment before
        y_t = Attn(x_t; p_1 .. p_N, h_s+1, x_s+1, .., h_t, x_t)       p: persistent pairs
        M_t = M_t-1, updated with y_t
        o_t = (y_t ⊗ M_t(y_t)) W_o

Causality.  As printed, all h of a segment stand before its tokens, so that token i sees h_j, made of x_j, for j > i;
            and M is read after the whole segment has been written. Here token i sees h_j for j <= i, which is
            attention's own mask where h_t stands just before x_t; and M_t(y_t) is the memory's own causal read.
Segments.   For attention a segment is a document: nothing of the one before is seen, positions begin again.
Update.     `memory_update: attention_output` is the above. M needs y, and y the M of the segment before: segments are
            computed one after another, T / L steps of L tokens each. `input` is an approximation, M_t(x_t) after an
            update with x_t: the memory no longer learns what attention has made of the tokens. It goes through the
            segments alone, and attention through all of them at once.
Others.     titans-pytorch has learned tokens for h, and no write of y. OpenTitans sees the future.

Documents begin where they like, in every row at another token, and so do segments. `cut` lays the tokens out so that
segment n of all rows is computed at once. Those that are shorter are filled up: a short one is its document's last, so
that what fills it up writes to a memory that is emptied next. Unless it is cut short by a call: then the state of the
row stays what it is once its tokens are through, and only other rows go on. Where nobody wants that state, as
in training, and turns are compiled, all segments are filled up to one size, of which there is one graph.

Shapes: B batch, T tokens, D model width, P places for tokens, filled or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mixers.layer import State, positions_of
from models.mixers.memory_attention import MemoryAttention, Product, check_width, width
from models.mixers.mixer import Mixer
from models.regression.regressor import Regressor

UPDATES = ("attention_output", "input")


class Held(NamedTuple):
    """The states of both mixers, and the memory's at the beginning of the segment."""

    memory: State | None = None
    start: State | None = None
    attention: State | None = None


class Span(NamedTuple):
    """Places that are computed at once. begins [B]: whether a segment begins with the first, None for in no row.
    active [B]: whether the row has tokens there, None for all.
    """

    places: slice
    begins: Tensor | None
    active: Tensor | None


class Cut(NamedTuple):
    """place [B, T]: of each token, among P. source [B, P]: the token in a place, the last one before where it is empty.
    spans: which places follow each other.
    """

    place: Tensor
    source: Tensor
    spans: list[Span]

    def fill(self, x: Tensor) -> Tensor:
        """[B, T, *] of tokens to [B, P, *] of places."""
        return _along(x, self.source)

    def empty(self, x: Tensor) -> Tensor:
        """The way back."""
        return _along(x, self.place)


def cut(positions: Tensor, segment: int, keep: bool = True) -> Cut:
    """Of tokens with these positions in their documents, [B, T]. keep: whether the rows' last states are wanted; from
    no state, and without them, all spans are filled up to whole segments, which have one size."""
    begins, index = positions % segment == 0, torch.arange(positions.shape[1], device=positions.device)
    number = begins.cumsum(1) - begins[:, :1].long()  # 0 is the segment that the call begins with, whole or not
    opens = begins | (index == 0)
    offset = index - torch.where(opens, index, 0).cummax(1).values
    lengths = F.one_hot(number).sum(1)  # [B, segments]
    longest = lengths.max(0).values if keep else torch.full_like(lengths[0], segment)
    first = longest.cumsum(0) - longest
    place = first[number] + offset
    source = torch.zeros(len(place), int(longest.sum()), dtype=torch.long, device=index.device)
    source = source.scatter_(1, place, index.expand_as(place)).cummax(1).values
    if keep:
        return Cut(place, source, list(_spans(lengths, number[:, -1], begins[:, 0])))
    begun = (lengths > 0).unbind(1)
    return Cut(place, source, [Span(slice(n * segment, (n + 1) * segment), x, None) for n, x in enumerate(begun)])


def uncut(positions: Tensor, segment: int) -> Cut:
    """The same for rows of one document each, from its first token on. A GPU is not waited for."""
    (B, T), index = positions.shape, torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    opens = torch.ones(B, dtype=torch.bool, device=positions.device)
    return Cut(index, index, [Span(slice(n, min(n + segment, T)), opens, None) for n in range(0, T, segment)])


def _spans(lengths: Tensor, last: Tensor, begins: Tensor) -> Iterator[Span]:
    """A segment's places, in pieces where rows end whose state others must not touch: at the end of the call, and where
    the segment ends that a call goes on with. lengths [B, segments], last [B]: which is the row's last, begins [B]:
    whether the first is whole.
    """
    rows, stops = lengths.tolist(), [{size} for size in lengths.max(0).values.tolist()]
    for row, n, whole in zip(rows, last.tolist(), begins.tolist(), strict=True):
        stops[n].add(row[n])
        if not whole:
            stops[0].add(row[0])
    place = 0
    for n, pieces in enumerate(stops):
        taken = 0
        for stop in sorted(pieces):
            active = None if all(row[n] > taken for row in rows) else lengths[:, n] > taken
            opens = None if taken else lengths[:, n] > 0 if n else begins
            yield Span(slice(place, place + stop - taken), opens, active)
            place, taken = place + stop - taken, stop


def _along(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, t]], or x where that is the same."""
    if index.shape[1] == x.shape[1]:
        return x
    return x.gather(1, index.view(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def choose(rows: Tensor | None, new: Any, old: Any) -> Any:
    """The new state in the rows given (bool [B], None for all), the old one in the others."""
    if rows is None:
        return new
    if isinstance(new, Tensor):
        return torch.where(rows.view(-1, *[1] * (new.ndim - 1)), new, old)
    if not isinstance(new, tuple):
        return new
    chosen = [choose(rows, a, b) for a, b in zip(new, old, strict=True)]
    return type(new)(*chosen) if hasattr(new, "_fields") else tuple(chosen)


class MemoryAsContext(MemoryAttention):
    """The layer above.

    memory, attention: constructors of mixers, with states of one size. segment: L. memory_update: attention_output |
    input. product: sigmoid | silu.
    """

    place = "context of attention"

    def __init__(
        self,
        hidden_size: int,
        layer_index: int,
        memory: Callable[..., Mixer],
        attention: Callable[..., Mixer],
        segment: int = 64,
        memory_update: str = "attention_output",
        product: str = "sigmoid",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if segment < 1:
            raise ValueError(f"segment={segment} is no number of tokens; a positive integer")
        if memory_update not in UPDATES:
            raise ValueError(f"memory_update={memory_update} is not one of {', '.join(UPDATES)}")
        self.segment, self.memory_update = segment, memory_update
        self.attention = self.build("attention", attention, hidden_size, layer_index)
        self.memory = self.build("memory", memory, hidden_size, layer_index)
        for name, mixer in (("attention", self.attention), ("memory", self.memory)):
            check_width(name, mixer, hidden_size)
            if mixer.state_size(1) < mixer.state_size(2**20):
                raise ValueError(
                    f"{name}.regressor={type(mixer.regressor).__name__} has a state that grows with the sequence, and "
                    "memory as context needs one of a fixed size"
                )
        if type(self.regressor).recall is Regressor.recall:
            raise ValueError(
                f"memory.regressor={type(self.regressor).__name__} can't be read without a write, as memory as context "
                "must be"
            )
        self.projection = nn.Linear(hidden_size, self.memory.num_heads * self.memory.key_dim, bias=False)
        self.product = Product(width(self.attention), product, norm_eps)
        self.output = nn.Linear(width(self.attention), hidden_size, bias=False)

    def outputs(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return self(x, None, segments, keep=False)[0]

    def emptied(self, state: State) -> State | None:
        return None  # segments are laid out anew at each call, by the host

    def forward(
        self, x: Tensor, state: State | None = None, segments: Tensor | None = None, keep: bool = True
    ) -> tuple[Tensor, State]:
        """keep: whether the state after the last token is wanted; else what is returned for it is of no use."""
        return self._forward(x, state, segments, keep, compiled=torch.compiler.is_compiling())

    @torch.compiler.disable  # how many segments there are depends on the documents
    def _forward(
        self, x: Tensor, state: State | None, segments: Tensor | None, keep: bool, compiled: bool
    ) -> tuple[Tensor, State]:
        """compiled: whole segments by torch.compile, which makes one graph for all of them and all layers."""
        position = segment = None
        held, before = Held(), torch.zeros_like(x[:, 0, 0], dtype=torch.long)
        if state is not None:
            held, position, segment = state.memory, state.position, state.segment
            before = before if segment is None else segment
        if segments is None:
            documents = before.unsqueeze(1).expand(x.shape[:2])
        else:
            documents, segment = segments, segments[:, -1]
            position = None if position is None else position.masked_fill(before != segments[:, 0], 0)
        positions = positions_of(x, position, segments)
        if state is None and segments is None:
            layout = uncut(positions, self.segment)
        else:
            layout = cut(positions, self.segment, keep or state is not None or not compiled)
        if self.memory_update == "attention_output":
            o, held = self._in_turn(layout, x, documents, positions, held, compiled)
        else:
            o, held = self._at_once(layout, x, documents, positions, held)
        return self.output(o), State(held, (), positions[:, -1] + 1, segment)

    def _in_turn(
        self, layout: Cut, x: Tensor, documents: Tensor, positions: Tensor, held: Held, compiled: bool
    ) -> tuple[Tensor, Held]:
        """A segment after the other."""
        outputs = []
        filled = [layout.fill(y) for y in (x, documents, positions)]
        for places, begins, active in layout.spans:
            # copies: strides that depend on how many segments there are would be another graph for each number
            tokens, document, position = (y[:, places].clone(memory_format=torch.contiguous_format) for y in filled)
            old = self._begin(held, document, begins)
            whole = places.stop - places.start == self.segment
            turn = compiled_turn() if compiled and whole and old.memory is not None else MemoryAsContext.turn
            o, new = turn(self, tokens, document, position, old)
            held = choose(active, new, old)
            outputs.append(o)
        return layout.empty(torch.cat(outputs, dim=1)), held

    def turn(self, x: Tensor, documents: Tensor, positions: Tensor, held: Held) -> tuple[Tensor, Held]:
        """A segment, or a piece of one: recall, attend, learn."""
        memory, start, attention = held
        h = self._recall(x, positions, start)
        y, attention = self._attend(h, x, positions, attention)
        m, memory = self._learn(y, memory, documents)
        return self.product(y, m), Held(memory, self._emptied(memory) if start is None else start, attention)

    def _at_once(self, layout: Cut, x: Tensor, documents: Tensor, positions: Tensor, held: Held) -> tuple[Tensor, Held]:
        """The memory through all segments, which learns from x, and then attention in all of them."""
        context, read = [], []
        filled = [layout.fill(y) for y in (x, documents, positions)]
        for places, begins, active in layout.spans:
            tokens, document, position = (y[:, places] for y in filled)
            memory, start, attention = old = self._begin(held, document, begins)
            context.append(self._recall(tokens, position, start))
            m, memory = self._learn(tokens, memory, document)
            held = choose(active, Held(memory, self._emptied(memory) if start is None else start), old)
            held = held._replace(attention=attention)
            read.append(m)
        h, m = (layout.empty(torch.cat(y, dim=1)) for y in (context, read))
        y, attention = self._attend(h, x, positions, held.attention)
        return self.product(y, m), held._replace(attention=attention)

    def _begin(self, held: Held, documents: Tensor, begins: Tensor | None) -> Held:
        """The memory as the document wants it, and where segments begin taken for the start of one."""
        if held.memory is None:
            return held
        memory = self.memory.enter(held.memory, documents[:, 0])
        start = held.start if begins is None else choose(begins, memory._replace(tails=()), held.start)
        return held._replace(memory=memory, start=start)

    def _emptied(self, memory: State) -> State:
        """An empty memory: what a document begins with."""
        rows = torch.ones_like(memory.position, dtype=torch.bool)
        return State(self.regressor.forget(memory.memory, rows), (), memory.position, memory.segment, memory.turn)

    def _recall(self, x: Tensor, positions: Tensor, start: State | None) -> Tensor:
        return self.memory.recall(self.projection(x), x, positions, start)

    def _learn(self, y: Tensor, memory: State | None, documents: Tensor) -> tuple[Tensor, State]:
        """The memory updated with y, and its reads. All tokens of a row are of one document, which it has entered."""
        m, memory = self.memory(y, memory)
        return m, State(memory.memory, memory.tails, memory.position, documents[:, 0], memory.turn)

    def _attend(self, h: Tensor, x: Tensor, positions: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Attention in which h_t stands before x_t and segments are documents, numbered as they come."""
        number = (positions % self.segment == 0).cumsum(1)
        if state is not None and state.segment is not None:
            number = number + state.segment.unsqueeze(1)
        both = torch.stack([h, x], dim=2).flatten(1, 2)
        y, state = self.attention(both, state, number.repeat_interleave(2, dim=1))
        return y[:, 1::2], state

    def flops_per_token(self, seq_len: int) -> int:
        """Both mixers', attention's for the tokens and what is recalled; queries and recall; W_o."""
        whole, rest = divmod(seq_len, self.segment)
        attention = sum(
            count * 2 * tokens * self.attention.flops_per_token(2 * tokens)
            for count, tokens in ((whole, self.segment), (1, rest))
            if tokens
        )
        products = 2 * (self.projection.weight.numel() + self.output.weight.numel())
        recall = self.regressor.recall_flops_per_token() + self.features.flops_per_token() // 2
        return self.memory.flops_per_token(seq_len) + attention // seq_len + recall + products

    def state_size(self, seq_len: int) -> int:
        """Numbers held per sequence: the memory's, that of the segment's start, and attention's."""
        return super().state_size(seq_len) + self.regressor.state_size(seq_len)


@cache
def compiled_turn() -> Callable[..., tuple[Tensor, Held]]:
    """A whole segment, by torch.compile: one graph for all of them, in all layers. Those that documents and calls cut
    off have many lengths, and are not compiled."""
    return torch.compile(MemoryAsContext.turn, dynamic=False, options={"comprehensive_padding": False})
