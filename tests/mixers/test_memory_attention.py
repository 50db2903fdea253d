"""A memory and attention in one layer: against loops written from the equations, with other parts, over documents that
begin at another token in every row."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from models.language_model import LanguageModel, LanguageModelConfig
from models.mixers import memory_context
from models.mixers.memory_context import Held, cut
from models.mixers.mixer import Mixer
from models.regression.memory import Memory
from models.regression.regressor import Regressor
from tests.laws import test_laws as laws
from tests.laws.presets import (
    CHUNK,
    HEADS,
    HIDDEN,
    PRESETS,
    inputs,
    largest_difference,
    marked,
    mixer,
    outcome,
    probe,
    recipe,
)
from tests.test_config import composed

TRIO = ("titans_mac", "titans_mag", "titans_mal")


def has_recall(regressor: Regressor) -> bool:
    return isinstance(regressor, Memory) and type(regressor).recall is not Regressor.recall


MEMORIES = [p for p in PRESETS if p not in TRIO and has_recall(mixer(p).regressor)]


def rotated(x: Tensor, position: int) -> Tensor:
    """[H, K] at a position, by complex numbers."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def softmax_read(attention: Mixer, x: list[Tensor], positions: list[int]) -> Tensor:
    """Of the last token [D], all of them and the persistent pairs."""
    r, heads = attention.regressor, []
    q, k, v = torch.stack([attention.projection(y) for y in x]).unflatten(-1, (3, HEADS, -1)).unbind(1)
    q, k = (
        torch.stack([rotated(F.normalize(y, dim=-1), p) for y, p in zip(z, positions, strict=True)]) for z in (q, k)
    )
    k, v = torch.cat([r.persistent_keys, k]), torch.cat([r.persistent_values, v])
    for h in range(HEADS):
        heads.append((r.log_beta[h].exp() * k[:, h] @ q[-1, h]).softmax(0) @ v[:, h])
    return torch.cat(heads)


class Titans:
    """The memory's own rule, token by token: a short convolution, silu, length one, then eqs (13) and (14), their
    gates tied as models/regression/linear/momentum.py says."""

    def __init__(self, memory: Mixer) -> None:
        self.memory, width = memory, HIDDEN // HEADS
        self.M = self.D = torch.zeros(HEADS, width, width, dtype=torch.float64)
        self.projected: list[Tensor] = [torch.zeros(3 * HIDDEN, dtype=torch.float64)] * 3

    def read(self, q: Tensor, M: Tensor) -> Tensor:
        q = F.normalize(F.silu(q).unflatten(-1, (HEADS, -1)), dim=-1)
        return self.memory.output_norm((q.unsqueeze(1) @ M).squeeze(1)).flatten()

    def write(self, y: Tensor) -> Tensor:
        """Stores what y says and reads what it asks: M_t(y_t)."""
        self.projected.append(self.memory.projection(y))
        weight = self.memory.convolution.weight
        q, k, v = sum(weight[:, -1 - j] * self.projected[-1 - j] for j in range(4)).chunk(3)
        k, v = F.normalize(F.silu(k).unflatten(-1, (HEADS, -1)), dim=-1), F.silu(v).unflatten(-1, (HEADS, -1))
        eta, theta = self.memory.regressor.momentum(y).sigmoid(), self.memory.regressor.step_size(y).sigmoid()
        gates = (x.view(-1, 1, 1) for x in (eta, (1 - eta) * theta, self.memory.decay(y.view(1, 1, -1))[0].exp()))
        eta, theta, alpha = gates
        error = v.unsqueeze(1) - k.unsqueeze(1) @ self.M
        U = self.D + theta * k.unsqueeze(2) @ error
        self.M, self.D = alpha * (self.M + (1 - eta) * U), alpha * eta * U
        return self.read(q, self.M)


@pytest.mark.parametrize("B", [1, 3])
def test_compiled_turns_are_one_graph(B, monkeypatch):
    """Whatever the documents, and so the number of segments: those that are compiled are filled up to one size."""
    graphs: list[torch.fx.GraphModule] = []

    def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    turn = torch.compile(memory_context.MemoryAsContext.turn, backend=counted, dynamic=False)
    monkeypatch.setattr(memory_context, "compiled_turn", lambda: turn)
    torch.compiler.reset()
    m, x = mixer("titans_mac"), inputs(B, 3 * CHUNK + 2)
    for length in (3, CHUNK, CHUNK + 3, 4 * CHUNK):
        segments = (torch.arange(x.shape[1]) // length).expand(B, -1)
        found, _ = m._forward(x, None, segments, keep=False, compiled=True)
        assert largest_difference([found], [m(x, None, segments)[0]]) < 1e-12
    assert len(graphs) == 1


@pytest.mark.parametrize("update", ["attention_output", "input"])
@pytest.mark.parametrize("T", [3, CHUNK, 2 * CHUNK + 5])
def test_memory_as_context_is_the_loop(update, T):
    """Segment by segment and token by token, eqs (21) to (25); and a state goes on where the loop does."""
    m, x = mixer("titans_mac", memory_update=update, norm_eps=1e-30), inputs(1, T)
    titans, outputs = Titans(m.memory), []
    for t in range(T):
        if t % CHUNK == 0:
            start, context, positions = titans.M, [], []
        h = titans.read(m.projection(x[0, t]), start)
        context += [h, x[0, t]]
        positions += [len(positions), len(positions) + 1]
        y = softmax_read(m.attention, context, positions)
        read = titans.write(y if update == "attention_output" else x[0, t])
        outputs.append(m.output(m.product.attention_norm(y) * m.product.memory_norm(read).sigmoid()))
    assert largest_difference([m(x)[0][0]], [torch.stack(outputs)]) < 1e-10
    _, state = m(x[:, :2])
    assert largest_difference([m(x[:, 2:], state)[0][0]], [torch.stack(outputs[2:])]) < 1e-10


def test_memory_as_gate_and_as_layer_are_the_equations():
    gate, layer, x = mixer("titans_mag", norm_eps=1e-30), mixer("titans_mal", norm_eps=1e-30), inputs(1, 9)
    titans, outputs = Titans(gate.memory), []
    for t in range(9):
        y = softmax_read(gate.attention, list(x[0, : t + 1]), list(range(t + 1)))
        product = gate.product.attention_norm(y) * gate.product.memory_norm(titans.write(x[0, t])).sigmoid()
        outputs.append(gate.output(product))
    assert largest_difference([gate(x)[0][0]], [torch.stack(outputs)]) < 1e-10
    learned, _ = layer.memory(x)
    outputs = [softmax_read(layer.attention, list(learned[0, : t + 1]), list(range(t + 1))) for t in range(9)]
    assert largest_difference([layer(x)[0][0]], [layer.output(torch.stack(outputs))]) < 1e-10


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("titans_mag", {"attention__regressor__window": 3, "product": "silu"}),
        ("titans_mal", {"attention__regressor__window": 3, "attention__regressor__persistent": 1}),
        pytest.param("titans_mac", {"memory_update": "input"}, marks=pytest.mark.slow),
        pytest.param("titans_mac", {"attention__regressor__window": 5, "conv_size": 3}, marks=pytest.mark.slow),
        pytest.param("titans_mac", {"segment": 1, "product": "silu"}, marks=pytest.mark.slow),
        pytest.param(
            *("titans_mac", {"segment": 3, "attention__num_kv_heads": 1, "regressor__grad_batch": 4}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_they_keep_the_laws_with_other_settings(preset, changes, monkeypatch):
    monkeypatch.setattr(laws, "mixer", lambda name, *args, **more: mixer(name, *args, **changes, **more))
    for form in ("torch", "recurrent"):
        laws.test_1_causal(preset, form)
        laws.test_2_rows_are_independent(preset, form)
        laws.test_4_packed_documents_are_separate_sequences(preset, form)
    laws.test_3_one_map_in_every_form(preset)
    laws.test_3_decoding_token_by_token(preset)
    laws.test_5_gradients_cross_chunks(preset)
    laws.test_9_counts(preset)


@pytest.mark.parametrize("memory", marked(MEMORIES))
@pytest.mark.parametrize("preset", TRIO)
def test_any_memory_takes_the_place(preset, memory):
    """By its recipe; any split into calls and packed documents stay what they are."""
    m = mixer(preset, memory={**deepcopy(recipe(memory)), "_partial_": True, "conv_size": 3})
    assert type(m.regressor) is type(mixer(memory).regressor)
    x, segments = inputs(2, 19), torch.tensor([0] * 4 + [1] * 11 + [2] * 4).expand(2, -1)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if memory == "gated_kalman" else {"atol": 1e-9}  # as far as it iterates
    y = m(x)[0]
    assert torch.allclose(in_calls(m, x, None, (5, 6, 16)), y, **tolerance)
    packed = torch.cat([m(piece)[0] for piece in x.split([4, 11, 4], dim=1)], dim=1)
    assert torch.allclose(in_calls(m, x, segments, (2, 9)), packed, **tolerance)


def in_calls(m: torch.nn.Module, x: Tensor, segments: Tensor | None, splits: tuple[int, ...]) -> Tensor:
    state, outputs, ends = None, [], (*splits, x.shape[1])
    for a, b in zip((0, *splits), ends, strict=True):
        y, state = m(x[:, a:b], state, None if segments is None else segments[:, a:b])
        outputs.append(y)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(
    "preset, changes",
    [("titans_mac", {}), ("titans_mac", {"memory_update": "input"}), ("titans_mag", {}), ("titans_mal", {})],
    ids=str,
)
def test_documents_begin_at_another_token_in_every_row(preset, changes):
    """Rows of a batch are what they are alone, in one call and in several: outputs, gradients and what they leave."""
    m, x = mixer(preset, **changes), inputs(4, 37)
    lengths = ([37], [3, 20, 14], [8, 1, 1, 27], [30, 7])
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    x.requires_grad_()
    alone = torch.cat([m(x[b : b + 1], None, segments[b : b + 1])[0] for b in range(4)])
    expected = [alone, *torch.autograd.grad(probe(alone), [x, *m.parameters()])]
    for splits in ((), (1,), (5, 6, 20), (8, 16, 33), tuple(range(1, 37))):
        assert largest_difference(outcome(m, x, splits, segments, memory=False), expected) < 1e-10, splits
    more = inputs(4, 10, seed=5)
    _, state = m(x, None, segments)
    after = torch.cat([segments[:, -1:]] * 6 + [segments[:, -1:] + 1] * 4, dim=1)
    for b in range(4):
        _, own = m(x[b : b + 1], None, segments[b : b + 1])
        expected, _ = m(more[b : b + 1], own, after[b : b + 1])
        assert largest_difference([m(more, state, after)[0][b : b + 1]], [expected]) < 1e-10


def test_tokens_are_laid_out_by_segments():
    """The second row is 2 tokens into a segment, and another document begins after 3 more."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 0, 1, 2, 3]])
    layout = cut(positions, 4)
    assert layout.place.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 4, 7, 8, 9, 10]]
    x = torch.arange(14).view(2, 7)
    assert torch.equal(layout.empty(layout.fill(x)), x)
    assert [(s.places.start, s.places.stop) for s in layout.spans] == [(0, 2), (2, 4), (4, 7), (7, 11)]
    one, other, both = [True, False], [False, True], [True, True]
    assert [None if s.active is None else s.active.tolist() for s in layout.spans] == [None, one, None, other]
    assert [None if s.begins is None else s.begins.tolist() for s in layout.spans] == [one, None, both, other]


@pytest.mark.parametrize("preset", MEMORIES)
def test_recall_is_the_read_of_what_a_call_has_left(preset):
    """What the last query of a call has read, it reads again; and what is empty reads nothing."""
    m, seen = mixer(preset), []
    m.regressor.register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
    with torch.no_grad():
        m(inputs(2, 11))
        (x, q, *_), (o, state) = seen[0]
        assert torch.allclose(m.regressor.recall(x[:, -1:], q[:, -1:], state), o[:, -1:], atol=1e-9)
        empty = m.regressor.forget(state, torch.ones(2, dtype=torch.bool))
        assert torch.allclose(m.regressor.recall(x, q, None), m.regressor.recall(x, q, empty), atol=1e-12)


def test_the_state_never_grows():
    m = mixer("titans_mac")
    shapes = [[tuple(t.shape) for t in laws.tensors(m(inputs(1, T))[1])] for T in (1, CHUNK, 40)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert isinstance(m(inputs(1, 3))[1].memory, Held)


@pytest.mark.parametrize("preset", TRIO)
@pytest.mark.parametrize(
    "overrides, regressor",
    [
        (["mixer@model.mixers.main.memory=gated_delta"], "Delta"),
        (["mixer@model.mixers.main.memory=mesa", "decay@model.mixers.main.memory.decay=none"], "LeastSquares"),
        (["regressor@model.mixers.main.memory.regressor=omega", "model.mixers.main.attention.num_kv_heads=1"], "Omega"),
    ],
    ids=str,
)
def test_the_memory_is_swapped_by_override(preset, overrides, regressor):
    cfg = composed(f"model={preset}", *overrides)
    model = LanguageModel(LanguageModelConfig(**OmegaConf.to_container(cfg.model, resolve=True)))
    assert type(model.blocks[0].mixer.regressor).__name__ == regressor


@pytest.mark.parametrize(
    "preset, changes, message",
    [
        ("titans_mac", {"segment": 0}, "segment=0"),
        ("titans_mac", {"memory_update": "output"}, "memory_update=output is not one of attention_output, input"),
        ("titans_mag", {"product": "none"}, "product=none is not one of silu, sigmoid"),
        ("titans_mac", {"memory__value_dim": 4}, "memory.num_heads=2 times memory.value_dim=4 must be 32"),
        ("titans_mag", {"attention__value_dim": 4}, "memory.num_heads=2 times memory.value_dim=16 must be 8"),
        ("titans_mac", {"memory": "softmax"}, "memory.regressor=Softmax has a state that grows"),
        ("titans_mac", {"memory": "sliding_window"}, "memory.regressor=SlidingWindow can't be read without a write"),
        ("titans_mac", {"attention": "forgetting"}, "attention.regressor=Forgetting has a state that grows"),
        ("titans_mag", {"memory": "titans_mal"}, "memory=MemoryAsLayer must be a mixer with a regressor"),
    ],
)
def test_mistakes_are_named(preset, changes, message):
    changes = {k: v if v not in PRESETS else {**deepcopy(recipe(v)), "_partial_": True} for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        mixer(preset, **changes)
