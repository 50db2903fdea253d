"""The laws that every mixer obeys, float64 on the CPU unless said otherwise. The presets are read from conf/mixer.

A law that fails says in a sentence what the layer does that it must not.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.mixers.mixer import Mixer
from tests.laws.presets import (
    CHUNK,
    DECAYS,
    PRESETS,
    inputs,
    largest_difference,
    marked,
    mixer,
    outcome,
    part,
    probe,
    tensors,
)

QUICK = ("none", "scalar", "channel", "signed")  # a decay of each kind
of_many = [pytest.mark.slow] if len(PRESETS) > 1 else []  # the quick look at many presets leaves it out
every_preset = pytest.mark.parametrize("preset", marked(PRESETS))
every_form = pytest.mark.parametrize("backend", ["torch", pytest.param("recurrent", marks=of_many)])
T = 2 * CHUNK + 5  # two chunks and a rest


def counted(preset: str, m: Mixer, name: str, length: int) -> int:
    """What the mixer says of itself, flops_per_token or state_size."""
    try:
        return getattr(m, name)(length)
    except NotImplementedError:
        why = f"{preset}: {type(m.regressor).__name__} has no {name}(seq_len), which every regressor must have"
        pytest.fail(why, pytrace=False)


@every_preset
@every_form
def test_1_causal(preset, backend):
    """Changing a token changes no output before it: exactly."""
    m = mixer(preset, backend)
    x = inputs(1, T)
    y, _ = m(x)
    for t in (1, CHUNK - 1, CHUNK, T - 1):
        changed = x.clone()
        changed[:, t] += 1
        z, _ = m(changed)
        same = torch.equal(y[:, :t], z[:, :t])
        assert same, f"{preset}: changing token {t} changes the output of an earlier token: the layer is not causal"
        assert not torch.equal(y[:, t], z[:, t]), f"{preset}: changing token {t} does not change its own output"


@every_preset
@every_form
def test_2_rows_are_independent(preset, backend):
    m = mixer(preset, backend)
    x = inputs(3, T)
    changed = x.clone()
    changed[1] += 1
    y, z = m(x)[0], m(changed)[0]
    assert torch.equal(y[[0, 2]], z[[0, 2]]), f"{preset}: changing one row of the batch changes the others' outputs"
    alone = torch.cat([m(row.unsqueeze(0))[0] for row in x])
    assert largest_difference([alone], [y]) < 1e-12, f"{preset}: a row alone is not what it is in a batch"


@every_preset
def test_3_one_map_in_every_form(preset):
    """Recurrent = parallel = any split into calls: outputs, final state, all gradients."""
    x, forms = inputs(2, T), {backend: mixer(preset, backend) for backend in ("torch", "recurrent")}
    truth = outcome(forms["recurrent"], x)
    error = largest_difference(outcome(forms["torch"], x), truth)
    assert error < 1e-10, f"{preset}: backend=torch, the parallel form, is not backend=recurrent, the definition"
    for backend, m in forms.items():
        for splits in ((1,), (CHUNK,), (5, 6, 7, 17), (T - 1,)):
            error = largest_difference(outcome(m, x, splits), truth)
            calls = f"{preset}, backend={backend}: calls that end at {splits} are not one call"
            assert error < 1e-10, f"{calls}: the state does not carry on what it must"


@every_preset
def test_3_decoding_token_by_token(preset):
    x = inputs(2, 20)
    error = largest_difference(outcome(mixer(preset), x, tuple(range(1, 20))), outcome(mixer(preset), x))
    assert error < 1e-10, (
        f"{preset}: token by token is not all tokens at once: the state does not carry on what it must"
    )


@every_preset
@every_form
def test_4_packed_documents_are_separate_sequences(preset, backend):
    """Outputs, gradients and the final state; and a document may go on in the next call."""
    m = mixer(preset, backend)
    lengths = (1, 2, CHUNK - 3, 3, CHUNK + 6, 5)
    x = inputs(2, sum(lengths)).requires_grad_()
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    pieces = [m(piece) for piece in x.split(lengths, dim=1)]
    y = torch.cat([piece for piece, _ in pieces], dim=1)
    separate = [y, *torch.autograd.grad(probe(y), [x, *m.parameters()])]
    packed = outcome(m, x, segments=segments, memory=False)
    seen = f"{preset}: a document sees the one before it in the row: the memory is not emptied where `segments` changes"
    assert largest_difference(packed, separate) < 1e-10, seen
    for splits in ((1,), (2, 3), (7, 16), (CHUNK,)):
        error = largest_difference(outcome(m, x, splits, segments, memory=False), packed)
        assert error < 1e-10, f"{preset}: packed documents in calls that end at {splits} are not those of one call"
    # what the last document leaves behind: read by one more token of it, and by the first of another
    more = inputs(2, 1, seed=3)
    _, state = m(x, None, segments)
    goes_on = largest_difference([m(more, state, segments[:, -1:])[0]], [m(more, pieces[-1][1])[0]])
    assert goes_on < 1e-10, f"{preset}: a document that goes on in the next call is not the one that stood alone"
    begins = largest_difference([m(more, state, segments[:, -1:] + 1)[0]], [m(more)[0]])
    assert begins < 1e-10, f"{preset}: a document that begins a call sees the one before: `forget` leaves something"


@every_preset
def test_5_gradients_cross_chunks(preset):
    x = inputs(1, 3 * CHUNK).requires_grad_()
    y, _ = mixer(preset)(x)
    (gradient,) = torch.autograd.grad(y[:, 2 * CHUNK :].square().sum(), x)
    reaches = (gradient[:, :CHUNK].norm(dim=-1) > 0).all()
    assert reaches, (
        f"{preset}: no gradient goes from the third chunk to a token of the first: the memory is cut between"
    )


@every_preset
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, pytest.param(2 * CHUNK, marks=of_many), 19])
def test_7_finite_at_the_extremes(preset, backend, dtype, T):
    """Zero keys, repeated keys, saturated gates, T = 1, T a multiple of nothing: outputs and gradients are finite. Two
    rows of each case, which are independent (law 2): what is not finite in one is not in the sum of all."""
    x, m = inputs(2, T, torch.float32), mixer(preset, backend, torch.float32)
    cases = {"plain": x, "zero": 0 * x, "repeated": x[:, :1].expand_as(x), "huge": 1e4 * x, "tiny": 1e-12 * x}
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        found = outcome(m, torch.cat(list(cases.values())))
    if not all(t.isfinite().all() for t in found):
        rows = zip(cases, found[0].split(2), found[-1 - len([*m.parameters()])].split(2), strict=True)
        which = [case for case, y, dx in rows if not (y.isfinite().all() and dx.isfinite().all())]
        pytest.fail(
            f"{preset}, backend={backend}, {dtype}, T={T}: an output or a gradient is not finite, of input {which}",
            pytrace=False,
        )


@every_preset
def test_9_counts(preset):
    """They are what is counted: in the tensors, by torch's counter on the definition, in the state itself."""
    m = mixer(preset, "recurrent")
    assert m.num_params == sum(p.numel() for p in m.parameters()), f"{preset}: num_params is not what it has"
    for length in (1, 40):
        with FlopCounterMode(display=False) as counter:
            _, state = m(inputs(1, length))
        done, said = counter.get_total_flops() / length, counted(preset, m, "flops_per_token", length)
        sentence = f"{preset}: flops_per_token({length}) says {said:.0f}, and backend=recurrent does {done:.0f}"
        assert done == pytest.approx(said, rel=0.02), sentence
        held = [t for t in [*tensors(state.memory), *tensors(state.tails)] if t.is_floating_point()]
        holds, said = sum(t.numel() for t in held), counted(preset, m, "state_size", length)
        assert holds == said, f"{preset}: state_size({length}) says {said}, and the state holds {holds} numbers"


@every_preset
def test_9_it_says_how_it_is_fitted(preset):
    """In the table that is printed before the first step."""
    regressor = mixer(preset).regressor
    said = isinstance(getattr(regressor, "fit", None), str)
    assert said, (
        f"{preset}: {type(regressor).__name__} has no `fit`, a few words on how it is fitted, which train.py prints"
    )


@every_preset
@pytest.mark.parametrize("decay", [pytest.param(d, marks=[] if d in QUICK else of_many) for d in DECAYS])
def test_an_impossible_decay_is_refused_when_built(preset, decay):
    """And a possible one makes another mixer that obeys law 3."""
    if DECAYS[decay] not in mixer(preset).regressor.accepts_decay:
        with pytest.raises(ValueError, match="possible choices of decay"):
            mixer(preset, decay=part("decay", decay))
        return
    x = inputs(2, T)
    recipe = {"decay": part("decay", decay)}
    truth = outcome(mixer(preset, "recurrent", **recipe), x)
    for splits in ((), (5, CHUNK)):
        error = largest_difference(outcome(mixer(preset, **recipe), x, splits), truth)
        assert error < 1e-10, f"{preset}, decay={decay}: calls that end at {splits} are not the definition in one call"
