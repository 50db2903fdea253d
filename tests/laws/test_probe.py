"""The view into the inner regression (models/training/probe.py) shows of every preset what a loop over tokens shows.
Float64 on the CPU. tests/training/test_probe.py has what it must show of some."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.regression.deep.retention import Entropic
from models.regression.deep.rules import AtEnd
from models.regression.regressor import Regressor, Tokens
from models.training import probe
from models.training.regression import ages_of, row_of
from tests.laws.presets import CHUNK, PRESETS, inputs, marked, mixer

T = CHUNK + 5
AGES = [-1, 0, 1, 3, 6]
pytestmark = pytest.mark.usefixtures("no_gradient")
every_preset = pytest.mark.parametrize("preset", marked(PRESETS))


@pytest.fixture(scope="module")
def no_gradient():
    with torch.no_grad():
        yield


def watched(m: torch.nn.Module, x: torch.Tensor) -> list[probe.Watched]:
    seen: list[probe.Watched] = []
    with probe.watching([SimpleNamespace(mixer=m)], seen.append):
        m(x)
    return seen


@cache
def seen_of(preset: str, **settings: Any) -> list[probe.Watched]:
    """The preset's mixers with the tokens of two texts."""
    return watched(mixer(preset, **settings), inputs(2, T))


def token(tokens: Tokens, t: int, n: int) -> Tokens:
    """Token t alone, with its n pairs, for a call of one row for each of AGES."""
    wide = {"k": n, "v": n}
    cut = {
        name: x if x is None else x[:, t * wide.get(name, 1) : (t + 1) * wide.get(name, 1)]
        for name, x in tokens._asdict().items()
    }
    return Tokens(**{name: x if x is None else x.repeat(len(AGES), *[1] * (x.ndim - 1)) for name, x in cut.items()})


def looped(seen: probe.Watched) -> tuple[torch.Tensor, torch.Tensor]:
    """|v - m(k)|^2 and v . m(k) [A, B, T, H] of every pair at AGES, token by token, from the state that the token
    before has left; and where the regressor has `recall`, from the state alone. NaN where no token is that old.
    """
    regressor, tokens = seen.mixer.regressor, seen.tokens
    B, H, n = len(tokens.q), tokens.q.shape[2], tokens.k.shape[1] // tokens.q.shape[1]
    length = tokens.q.shape[1]
    group = H // tokens.k.shape[2]
    k, v = (y.repeat_interleave(group, dim=2).unflatten(1, (length, n)) for y in (tokens.k, tokens.v))
    error = torch.full((len(AGES), B, length, H), torch.nan, dtype=torch.float64)
    product, state = error.clone(), None
    for t in range(length):
        one, turn = token(tokens, t, n), 1.0
        if t and tokens.segments is not None:
            state = regressor.forget(state, one.segments[:, 0] != token(tokens, t - 1, n).segments[:, 0])
        written = [min(max(t - age, 0), length - 1) for age in AGES]
        known = [a for a, age in enumerate(AGES) if t - age == written[a] and not (age < 0 and written[a] == 0)]
        for j in range(n):
            keys = torch.cat([k[:, i, j : j + 1] for i in written])
            if seen.turn is not None:
                turn = torch.cat([seen.turn[:, i : i + 1] * seen.turn[:, t : t + 1] for i in written]).unsqueeze(-1)
            o, after = regressor(one._replace(q=keys * turn), state)
            rule = getattr(regressor, "rule", None)  # which lets tokens read their mini-batch later
            stepped = isinstance(rule, AtEnd | Entropic) and not getattr(after, "memory", after).phase.any()
            has_recall = type(regressor).recall is not Regressor.recall and not hasattr(regressor, "query_mix")
            if has_recall and not stepped:
                assert (regressor.recall(one.x, keys * turn, after) - o).abs().max() < 1e-10, "recall is another read"
            for a in known:
                i, m = written[a], o.view(len(AGES), B, H, -1)[a]
                found = (v[:, i, j] - m).square().sum(-1), (v[:, i, j] * m).sum(-1)
                for total, x in zip((error, product), found, strict=True):
                    total[a, :, i] = x if j == 0 else total[a, :, i] + x
        state = after
    return error, product


@every_preset
def test_losses_are_those_of_a_loop_over_tokens(preset):
    """Before a write, after it, and later: the parallel form with other queries is the state, read token by token."""
    check_losses(preset, seen_of(preset))


def check_losses(preset: str, of_mixers: list[probe.Watched]) -> None:
    for seen in of_mixers:
        reads, _ = probe.reads(seen.mixer.regressor, seen.tokens, AGES, seen.turn)
        inside = reads.seen.unsqueeze(-1)
        for name, found, truth in zip(("error", "product"), (reads.error, reads.product), looped(seen), strict=True):
            known = inside.expand_as(truth)
            assert known.any() and truth[known].isfinite().all()
            worst = ((found - truth)[known].abs() / truth[known].abs().clamp(min=1.0)).max()
            assert worst < 1e-9, f"{preset} {seen.name}: the {name} of the probe is not that of a loop over tokens"


@every_preset
def test_weights_explain_the_reads(preset):
    """o_t = c_t + sum_i w_ti v_i, causally, wherever a regressor says that its reads are such sums."""
    for seen in seen_of(preset):
        regressor, tokens = seen.mixer.regressor, seen.tokens
        o, _ = regressor(tokens)
        w, rest = probe.weights(regressor, tokens)
        v = tokens.v.repeat_interleave(tokens.q.shape[2] // tokens.v.shape[2], dim=2)
        told = rest + torch.einsum("bths,bshv->bthv", w, v)
        worst = ((told - o).abs() / o.abs().clamp(min=1.0)).max()
        assert (worst < 1e-9) == regressor.weighs_values, (
            f"{preset}: {type(regressor).__name__}.weighs_values={regressor.weighs_values}, and weights that know of "
            f"no value are {worst:.0e} away from what it reads"
        )
        if regressor.weighs_values:
            entropy, reach = probe.spread(w)
            assert (reach[:, 0] == 0).all() and (entropy[:, 0].abs() < 1e-9).all()


@every_preset
def test_a_row_has_what_the_mixer_has(preset):
    """All finite, whatever the preset, and by the names of docs/regression.md."""
    for seen in seen_of(preset):
        row = row_of(seen)
        H = seen.tokens.q.shape[2]
        assert row["ages"] == ages_of(seen.tokens.q.shape[1])[1:] and len(row["recall"]) == H
        numbers = [x for name in ("loss", "recall") for head in row[name] for x in head]
        numbers += [x for value in row["quantities"].values() for x in (value if isinstance(value, list) else [value])]
        known = seen.tokens.segments is None
        assert not known or None not in numbers, row
        assert ("half_life" in row["quantities"]) == (seen.tokens.log_decay is not None)
        assert all(len(of_head) == 3 for value in row["quantiles"].values() for of_head in value)
