"""What the view into the inner regression (models/training/probe.py) must show of members of the family. Float64 on the
CPU. That it shows of every preset what a loop over tokens shows is told in tests/laws/test_probe.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.mixers.mixer import Mixer
from models.regression.regressor import Regressor, Tokens
from models.training import probe
from models.training.regression import row_of
from tests.laws.presets import HIDDEN, inputs, mixer, part
from tests.laws.test_probe import AGES, T, check_losses, looped, no_gradient, seen_of, watched  # noqa: F401
from tests.mixers.test_mixer import hand_on_products

pytestmark = pytest.mark.usefixtures("no_gradient")


def test_losses_of_grouped_heads():
    check_losses("softmax", seen_of("softmax", num_kv_heads=1))


@pytest.mark.parametrize("preset", ["gated_delta", "titans", "mamba2", "titans_mac"])
def test_products_that_stand_for_the_input_are_seen_through(preset, monkeypatch):
    """On a GPU a regressor is given those (Mixer._accelerated)."""
    m, x = mixer(preset), inputs(2, T)
    expected = [row_of(seen) for seen in watched(m, x)]
    hand_on_products(m, monkeypatch)
    assert [row_of(seen) for seen in watched(m, x)] == expected


KERNELS = "softmax linear mamba2 gated_delta kda delta_product titans titans_mlp ttt_linear mesa rwkv7 local_linear"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", KERNELS.split())
def test_what_kernels_are_given_is_seen_on_a_gpu(preset):
    """In bf16 and with documents, as in training: nearly what float32 shows by PyTorch."""
    sizes, T = {"num_heads": 2, "key_dim": 64, "value_dim": 64}, 128
    x = inputs(2, T, torch.float32).cuda()
    rows = []
    for backend in ("auto", "torch"):
        m = mixer(preset, backend, torch.float32, **sizes).cuda()
        with (
            torch.autocast("cuda", torch.bfloat16, enabled=backend == "auto"),
            torch.compiler.set_stance("force_eager"),
        ):
            rows.append([row_of(seen) for seen in watched(m, x)])
    for row, expected in zip(*rows, strict=True):
        assert row["quantities"].keys() == expected["quantities"].keys()
        assert torch.tensor(row["loss"]).allclose(torch.tensor(expected["loss"]), rtol=0.1, atol=0.05)


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


def test_the_effective_rank_and_the_reach_of_what_is_known():
    """r of r equal singular values, whatever their size and the precision of products; ages that can be counted."""
    for r in (0, 1, 5):
        M = torch.zeros(2, 9, 7)
        M[:, range(r), range(r)] = 1e-3
        with torch.autocast("cpu", torch.bfloat16):
            assert probe.effective_rank(M).tolist() == pytest.approx([r, r], rel=1e-5)
    w = torch.zeros(1, 4, 1, 8)  # two pairs a token, of which the last query sees three, one of them with a minus
    w[0, 3, 0, [0, 2, 3]] = torch.tensor([2.0, -1.0, 1.0])
    entropy, reach = probe.spread(w)
    assert reach[0, 3, 0] == 0.5 * 3 + 0.5 * 2 and entropy[0, 3, 0] == pytest.approx(0.6931472) and reach[0, 0, 0] == 0


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
