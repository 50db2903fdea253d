"""The laws that do not speak of a regression, on the baselines of conf/mixer/baseline; and what each is said to be, by
other means."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conf import schema
from models.build import build
from models.language_model import LanguageModel, LanguageModelConfig
from models.mixers.baselines.mamba import selective_scan
from models.regression.linear.linear import recurrent_linear
from models.training.optimizer import parameter_groups
from models.training.summary import summary
from tests.laws import test_laws as laws
from tests.laws.presets import CHUNK, CONF, HIDDEN, inputs, largest_difference, outcome

BASELINES = sorted(path.stem for path in (CONF / "mixer" / "baseline").glob("*.yaml"))
SMALL = {"mamba": {"chunk": 4, "piece": 8, "remat": 1, "state_dim": 4}, "long_conv": {"length": 2 * CHUNK}}
every_baseline = pytest.mark.parametrize("name", BASELINES)


@cache
def recipes() -> dict[str, dict[str, Any]]:
    schema.register()
    chosen = [f"+mixer@model.mixers.{name}=baseline/{name}" for name in BASELINES]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        mixers = compose("train", ["name=law", "run_dir=none", *chosen]).model.mixers
    return {name: OmegaConf.to_container(mixers[name], resolve=True) for name in BASELINES}


def baseline(name: str, backend: str = "torch", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(1)
    node = recipes()[name] | SMALL.get(name, {}) | {"backend": backend} | settings
    m = build(node, hidden_size=HIDDEN, layer_index=0).to(dtype)
    if name == "long_conv":  # filters that are not small beside what skips them
        m.weight.data *= 50
    return m


@pytest.fixture(autouse=True)
def _theirs(monkeypatch):
    monkeypatch.setattr(laws, "mixer", baseline)


@every_baseline
@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_1_and_2_causal_and_rows_are_independent(name, backend):
    """Exactly; but spectra have a rounding of all tokens in each."""
    if (name, backend) != ("long_conv", "torch"):
        laws.test_1_causal(name, backend)
        laws.test_2_rows_are_independent(name, backend)
        return
    m, x = baseline(name), inputs(3, laws.T)
    y, changed = m(x)[0], x.clone()
    changed[:, CHUNK] += 1
    assert (m(changed)[0] - y)[:, :CHUNK].abs().max() < 1e-14
    assert largest_difference([torch.cat([m(row.unsqueeze(0))[0] for row in x])], [y]) < 1e-12


@every_baseline
def test_3_to_5_forms_calls_documents_and_gradients(name):
    laws.test_3_one_map_in_every_form(name)
    laws.test_3_decoding_token_by_token(name)
    for backend in ("torch", "recurrent"):
        laws.test_4_packed_documents_are_separate_sequences(name, backend)
    if name != "long_conv":  # of which the filter reaches two chunks here
        laws.test_5_gradients_cross_chunks(name)


@every_baseline
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_7_finite_at_the_extremes(name, dtype):
    for backend, T in (("torch", 1), ("torch", 19), ("recurrent", 19)):
        laws.test_7_finite_at_the_extremes(name, backend, dtype, T)


@every_baseline
def test_9_counts(name):
    laws.test_9_counts(name)


@every_baseline
def test_a_state_that_is_long_and_documents_that_are_longer_than_a_piece(name):
    """Pieces and filters end inside documents, and calls inside both."""
    x, segments = inputs(2, 45), (torch.arange(45) >= 20).long().expand(2, -1)
    truth = outcome(baseline(name, "recurrent"), x, segments=segments)
    for splits in ((), (19, 20, 37), (3, 44)):
        assert largest_difference(outcome(baseline(name), x, splits, segments), truth) < 1e-10


def test_6_mamba_is_the_published_sum():
    """y_t = sum_{i<=t} (sum_n q_tn exp(A_n (s_{i+1} + ... + s_t)) b_in) s_i u_i in each channel: equations 2 and 3 of
    the paper, written out."""
    g = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=g)
    step, u, b, q, rate = draw(1, 6, 3).exp(), draw(1, 6, 3), draw(1, 6, 2), draw(1, 6, 2), -draw(3, 2).exp()
    y, _ = selective_scan(u.new_zeros(1, 3, 2), rate, (step, u, b, q, torch.ones(1, 6)))
    for t in range(6):
        total = torch.zeros(3, dtype=torch.float64)
        for i in range(t + 1):
            fade = (rate * step[0, i + 1 : t + 1].sum(0).unsqueeze(-1)).exp()
            total += (q[0, t] * fade * b[0, i]).sum(-1) * step[0, i] * u[0, i]
        torch.testing.assert_close(y[0, t], total)


def test_6_mamba_with_one_rate_is_linear_memory_with_a_decay():
    """All channels and numbers fade alike, with one step for all: what Mamba-2 makes of it."""
    step, x = inputs(1, 7).abs()[..., :1], inputs(1, 7, seed=5)
    u, b, q = x[..., :6], x[..., 6:10], x[..., 10:14]
    rate = torch.full((6, 4), -0.7, dtype=torch.float64)
    y, h = selective_scan(u.new_zeros(1, 6, 4), rate, (step.expand(-1, -1, 6), u, b, q, torch.ones(1, 7)))
    o, memory = recurrent_linear(q.unsqueeze(2), b.unsqueeze(2), (step * u).unsqueeze(2), -0.7 * step)
    assert largest_difference([y, h], [o.squeeze(2), memory[:, 0].mT]) < 1e-12


def test_6_long_conv_is_a_toeplitz_matrix():
    m, x = baseline("long_conv", length=5), inputs(1, 9)
    lag = torch.arange(9).unsqueeze(1) - torch.arange(9)
    matrix = torch.where((lag >= 0) & (lag < 5), m.filter[:, lag.clamp(0, 4)], 0.0)  # [D, T, T]
    c = torch.einsum("dts,bsd->btd", matrix, x) + m.skip * x
    a, b = m.output(torch.nn.functional.gelu(c)).chunk(2, dim=-1)
    torch.testing.assert_close(m(x)[0], a * b.sigmoid())
    assert (m.filter == 0).any() and (m.weight.abs() - m.filter.abs()).max() < 0.0010001


def test_a_wrong_setting_is_a_sentence():
    for name, settings, said in (
        ("mamba", {"piece": 10}, "piece=10 must be a multiple of chunk=4, or null"),
        ("mamba", {"conv_size": 1}, "conv_size=1 must be at least 2"),
        ("lstm", {"width": 0}, "width=0 must be at least 1, or null for the model's"),
        ("long_conv", {"length": 1}, "length=1 must be at least 2 tokens"),
        ("lstm", {"backend": "fla"}, "backend=fla is not one of auto, torch, recurrent"),
    ):
        with pytest.raises(ValueError, match=said):
            baseline(name, **settings)


def test_a_model_of_them_decodes_decays_and_is_loaded_as_it_was(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": HIDDEN, "num_layers": len(BASELINES)}
    mixers = {name: recipes()[name] | SMALL.get(name, {}) for name in BASELINES}
    torch.manual_seed(0)
    m = LanguageModel(LanguageModelConfig(mixers=mixers, pattern=BASELINES, **sizes)).double().eval()
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    told = m.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
    assert torch.equal(told[:, 9:], m(told).logits[:, 8:-1].argmax(-1))
    m.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path).double()
    assert all(torch.equal(x, m.state_dict()[name]) for name, x in loaded.state_dict().items())
    # where its weights lie in memory may change the order of a sum, on some processors
    torch.testing.assert_close(loaded(told).logits, m(told).logits, rtol=0, atol=1e-13)
    names = {id(p): name for name, p in m.named_parameters()}
    decayed, _ = parameter_groups(m, 0.1)
    ends = {names[id(p)].split(".", 2)[-1].removeprefix("mixer.") for p in decayed["params"]}
    own = {"projection.weight", "selection.weight", "cell.weight_ih_l0", "cell.weight_hh_l0"}
    assert ends == own | {"output.weight", "feed_forward.up.weight", "feed_forward.output.weight"}
    lines = summary(m, 16, torch.device("cpu"), torch.float32)
    assert all(f"{name} " in lines for name in ("LSTM", "LongConv", "Mamba"))
