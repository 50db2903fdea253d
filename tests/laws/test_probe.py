"""The view into the inner regression (models/training/probe.py): what it shows of every preset, by a loop over tokens,
and laws of the regression that it must show. Float64 on the CPU."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.mixers.mixer import Mixer
from models.regression.regressor import Regressor, Tokens
from models.training import probe
from models.training.regression import ages_of, row_of
from tests.laws.presets import CHUNK, HIDDEN, PRESETS, inputs, mixer, part

T = CHUNK + 5
AGES = [-1, 0, 1, 3, 6]
pytestmark = pytest.mark.usefixtures("no_gradient")
every_preset = pytest.mark.parametrize("preset", PRESETS)


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
            if type(regressor).recall is not Regressor.recall and not hasattr(regressor, "query_mix"):
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


def test_losses_of_grouped_heads():
    check_losses("softmax", seen_of("softmax", num_kv_heads=1))


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


def test_a_signed_decay_turns_what_is_read():
    """A negative decay turns the memory around, and with it what is read of the pairs before."""
    m = mixer("mamba2", decay=part("decay", "signed"))
    (seen,) = watched(m, 8 * inputs(2, T))
    assert seen.turn is not None and seen.turn.unique().tolist() == [-1, 1]
    reads, _ = probe.reads(seen.mixer.regressor, seen.tokens, AGES, seen.turn)
    error, _ = looped(seen)
    kept = reads.seen.unsqueeze(-1).expand_as(error)
    assert (reads.error - error)[kept].abs().max() < 1e-9
    aside, _ = probe.reads(seen.mixer.regressor, seen.tokens, AGES)
    turned = (seen.turn[:, 1:] * seen.turn[:, :-1] < 0).any()
    assert turned and (reads.product[2, :, :-1] - aside.product[2, :, :-1]).abs().max() > 0.1
    same = reads.product[2, :, :-1].abs() - aside.product[2, :, :-1].abs()
    assert same.abs().max() < 1e-9 and torch.equal(reads.product[1], aside.product[1])


# what the view must show of members of the family


def pairs(length: int = 24, width: int = 6, seed: int = 0) -> Tokens:
    """Random pairs whose keys have length one, for one head and one text; x is not looked at."""
    draw = torch.Generator().manual_seed(seed)
    k, v, x = (torch.randn(1, length, n, dtype=torch.float64, generator=draw) for n in (width, width, HIDDEN))
    k = torch.nn.functional.normalize(k, dim=-1).unsqueeze(2)
    return Tokens(x, k, k, v.unsqueeze(2))


def one_head(preset: str, **settings: Any) -> Mixer:
    return mixer(preset, num_heads=1, key_dim=6, value_dim=6, **settings)


def lasts(regressor: Regressor, tokens: Tokens) -> torch.Tensor:
    """m_T(k_i) of the last memory at all keys, [T, V], from the view: the read at age T - 1 - i of pair i."""
    length = tokens.q.shape[1]
    queries = torch.stack([tokens.k.roll(age, 1) for age in range(length)])
    o, _ = probe.read_at(regressor, tokens, queries)
    return o[:, 0, -1, 0].flip(0)


def test_mesa_has_the_least_objective_of_all_linear_memories():
    """sum_i w_i |v_i - k_i S|^2 + sum_j Lambda_j |S_j|^2 over all pairs so far: at mesa's S, and at the S of the other
    rules after the same pairs with the same decay, and beside it."""
    decay = torch.full((1, 24, 1), -0.05, dtype=torch.float64)
    tokens = pairs()._replace(log_decay=decay)
    k, v = tokens.k[0, :, 0], tokens.v[0, :, 0]
    regressor = one_head("mesa").regressor
    b = regressor.describe(tokens)["write_weight"][0, :, 0]
    ridge = (0.25 + torch.nn.functional.softplus(regressor.ridge))[0]
    weight = b * (decay[0, :, 0].flip(0).cumsum(0).flip(0) - decay[0, :, 0]).exp()

    def objective(S: torch.Tensor) -> float:
        return ((weight * (v - k @ S).square().sum(-1)).sum() + (ridge * S.square().sum(-1)).sum()).item()

    def memory(preset: str) -> torch.Tensor:
        reads = lasts(one_head(preset).regressor, tokens)
        S = torch.linalg.lstsq(k, reads).solution
        assert (k @ S - reads).abs().max() < 1e-8, f"{preset}: a linear memory is linear in its keys"
        return S

    best = memory("mesa")
    others = {name: objective(memory(name)) for name in ("gated_delta", "mamba2", "titans", "omega", "leaky_lms")}
    others |= {"nothing": objective(0 * best)}
    nudges = [objective(best + 1e-3 * torch.randn_like(best)) for _ in range(5)]
    assert objective(best) < min([*others.values(), *nudges]), (objective(best), others)


def test_a_delta_step_of_one_leaves_no_loss():
    """Before it there is one, and later writes bring it back; a step of one half leaves a quarter."""
    regressor, tokens = one_head("deltanet").regressor, pairs()
    for bias, left in ((40.0, 0.0), (0.0, 0.25)):
        torch.nn.init.zeros_(regressor.step_size.weight)
        torch.nn.init.constant_(regressor.step_size.bias, bias)
        reads, _ = probe.reads(regressor, tokens, [-1, 0, 4])
        before, after, later = reads.loss(torch.arange(24) > 0).flatten().tolist()
        assert before > 0.5 and later > after
        assert after == pytest.approx(left * before, abs=1e-12)


def test_softmax_recalls_by_competitors_and_not_by_age():
    """A pair's place among those that were written does not matter to softmax, and does to a memory that fades. A
    competitor with a key nearby matters to softmax; one far away hardly."""
    softmax, delta = one_head("softmax").regressor, one_head("gated_delta").regressor
    softmax.log_beta.fill_(3.0)
    tokens, value = pairs(), pairs().v[0, 0, 0]
    order = [*range(1, 20), 0, *range(20, 24)]  # the first pair becomes the twentieth
    moved = Tokens._make(None if x is None else x[:, order] for x in tokens)
    fading = {"log_decay": torch.full((1, 24, 1), -0.2, dtype=torch.float64)}

    def recalled(regressor: Regressor, **settings: Any) -> list[float]:
        """v . m(k) of that pair, old and young."""
        places = ((tokens, 0), (moved, 19))
        return [(lasts(regressor, x._replace(**settings))[place] @ value).item() for x, place in places]

    old, young = recalled(softmax)
    assert old == pytest.approx(young, abs=1e-12)
    old, young = recalled(delta, **fading)
    assert abs(old - young) > 0.1

    def error_with(key: torch.Tensor) -> float:
        k = tokens.k.clone()
        k[0, 5, 0] = key
        return (lasts(softmax, tokens._replace(k=k, q=k))[0] - value).square().sum().item()

    near, far = error_with(tokens.k[0, 0, 0]), error_with(-tokens.k[0, 0, 0])
    assert far < 0.5 * near
