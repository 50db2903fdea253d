"""The experiments of docs/examples/beyond: their objectives by other means, the members that they contain, and the laws
of every mixer that hold for forms, calls and documents."""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conf import schema
from models.build import build
from scripts.sweeps.jobs import sweep
from tests.conftest import ROOT
from tests.laws import presets
from tests.laws import test_laws as laws
from tests.laws.presets import CHUNK, HEADS, HIDDEN, change, inputs, largest_difference, part

FOLDER = ROOT / "docs" / "examples" / "beyond"
NAMES = sorted(path.stem for path in (FOLDER / "conf" / "mixer").glob("*.yaml"))
every_experiment = pytest.mark.parametrize("name", NAMES)
SMALL = {"joined": {"regressor__window": 5}, "surprise": {"regressor__longest": 4, "regressor__budget": 1.5}}


@pytest.fixture(autouse=True)
def _package(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("TTR_PACKAGES", "beyond")
    monkeypatch.setattr(laws, "mixer", experiment)


@cache
def recipes() -> dict[str, Any]:
    schema.register()
    chosen = [f"+mixer@model.mixers.{name}={name}" for name in NAMES]
    words = [f"hydra.searchpath=[file://{FOLDER}/conf]", "name=law", "run_dir=none", f"model.num_heads={HEADS}"]
    with initialize_config_dir(str(presets.CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("train", [*words, *chosen]).model.mixers, resolve=True)


def experiment(name: str, backend: str = "torch", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    node = OmegaConf.to_container(OmegaConf.create(recipes()[name]))
    torch.manual_seed(1)
    settings = {"regressor__backend": backend, "regressor__chunk": CHUNK} | SMALL.get(name, {}) | settings
    return build(change(node, **settings), hidden_size=HIDDEN, layer_index=0).to(dtype)


@every_experiment
def test_the_laws_hold(name):
    laws.test_1_causal(name, "torch")
    laws.test_3_one_map_in_every_form(name)
    laws.test_4_packed_documents_are_separate_sequences(name, "torch")
    laws.test_7_finite_at_the_extremes(name, "torch", torch.bfloat16, 19)
    laws.test_9_counts(name)


def called(name: str, **settings: Any) -> tuple[Any, Any, torch.Tensor]:
    """The regressor, what it is given in its mixer, and what it reads."""
    m, seen = experiment(name, **settings), []
    m.regressor.register_forward_hook(lambda module, given, made: seen.append((module, given[0], made[0])))
    m(inputs(1, 12))
    return seen[0]


def copied(name: str, like: str, names: dict[str, str], settings: dict[str, Any], others: dict[str, Any]) -> float:
    """How far an experiment with the weights of a preset is from that preset. names: of theirs, ours."""
    theirs, ours = presets.mixer(like, **others), experiment(name, **settings)
    weights = {names.get(key, key): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(ours.state_dict() | weights)
    x, segments = inputs(2, 21), (torch.arange(21) // 9).expand(2, -1)
    return largest_difference([ours(x, None, segments)[0]], [theirs(x, None, segments)[0]])


def test_a_line_search_finds_the_least_loss_of_the_window():
    """At every token, among all steps: and less than at either end of a small way around the best one."""
    regressor, (x, q, k, v, log_decay, _), o = called("line_search")
    b = regressor.share(x).sigmoid()[0]
    S = torch.zeros(HEADS, k.shape[-1], v.shape[-1], dtype=k.dtype)
    for t in range(12):
        S = log_decay[0, t].exp().view(-1, 1, 1) * S
        past = slice(max(0, t - regressor.window + 1), t + 1)
        keys, values = k[0, past].transpose(0, 1), v[0, past].transpose(0, 1)  # [H, W, *]
        direction = k[0, t].unsqueeze(-1) @ (v[0, t].unsqueeze(1) - k[0, t].unsqueeze(1) @ S)
        design = (keys @ direction).flatten(1).unsqueeze(-1)
        step = torch.linalg.lstsq(design, (values - keys @ S).flatten(1).unsqueeze(-1)).solution
        S = S + b[t].view(-1, 1, 1) * step * direction
        assert torch.allclose(o[0, t], (q[0, t].unsqueeze(1) @ S).squeeze(1), atol=1e-8)
    names = {f"regressor.step_size.{x}": f"regressor.share.{x}" for x in ("weight", "bias")}
    difference = copied("line_search", "gated_delta", names, {"regressor__window": 1}, {})
    assert difference < 1e-4  # keys are shorter than one by what keeps a key of zero from being divided by zero


def test_fading_keys_are_a_least_squares_fit_and_equal_channels_are_mesa():
    regressor, (x, q, k, v, log_decay, _), o = called("fading_keys")
    b, half = regressor.write_weight(x).sigmoid()[0], log_decay[0] / 2
    ridge = 0.25 + torch.nn.functional.softplus(regressor.ridge)
    for t in (0, 5, 11):
        for h in range(HEADS):
            faded = (half[: t + 1, h].sum(0) - half[: t + 1, h].cumsum(0)).exp()
            weight = b[: t + 1, h].sqrt().unsqueeze(-1)
            values = faded.log().mean(-1, keepdim=True).exp() * v[0, : t + 1, h]
            design = torch.cat([weight * faded * k[0, : t + 1, h], ridge[h].sqrt().diag()])
            target = torch.cat([weight * values, v.new_zeros(len(ridge[h]), v.shape[-1])])
            memory = torch.linalg.lstsq(design, target).solution
            assert torch.allclose(o[0, t, h], q[0, t, h] @ memory, atol=1e-9)
    others = {"regressor__solver": "cholesky", "regressor__decay_cap": None}
    assert copied("fading_keys", "mesa", {}, {"decay": part("decay", "scalar")}, others) < 1e-10


def test_joined_is_a_local_line_with_a_prior_and_its_window_alone_where_the_memory_is_empty():
    regressor, (x, q, k, v, log_decay, _), o = called("joined")
    near, far = regressor.near, regressor.far
    beta, ridge = near.beta(q), near.ridge(q)
    for t in (0, 3, 11):
        tokens = [None if y is None else y[:, : t + 1] for y in (x, q, k, v, log_decay, None)]
        memory = far(type(called("joined")[1])(*tokens))[1][0]  # [H, K, V]
        for h in range(HEADS):
            past = slice(max(0, t - near.window + 1), t + 1)
            keys, values, query = k[0, past, h], v[0, past, h], q[0, t, h]
            w = (beta[h] * keys @ query).softmax(0).sqrt().unsqueeze(-1)
            shifted = keys - query
            design = torch.cat([torch.ones_like(w), shifted], dim=1) * w
            K = len(query)
            prior = torch.nn.functional.pad(torch.eye(K, dtype=k.dtype), (1, 0)) * ridge[h].sqrt()
            target = torch.cat([w * values, ridge[h].sqrt() * memory[h]])
            line = torch.linalg.lstsq(torch.cat([design, prior]), target).solution
            assert torch.allclose(o[0, t, h], line[0], atol=1e-8)


def test_no_budget_of_surprise_is_leaky_lms_and_more_makes_mini_batches_longer():
    assert copied("surprise", "leaky_lms", {}, {"regressor__budget": 0.0}, {}) < 1e-10
    lengths = []
    for budget in (0.0, 1.0, 4.0, None):
        m = experiment("surprise", regressor__budget=budget, regressor__longest=8)
        m(inputs(2, 24))
        lengths.append(m.regressor.diagnostics()["mini_batch"].item())
    assert lengths[0] == 1 and lengths[-1] == 8 and lengths == sorted(lengths)


def test_the_sweep_of_the_page_is_all_of_them_and_their_parents():
    page = (ROOT / "docs" / "beyond.md").read_text()
    (models,) = re.findall(r"^    (model=\S+)$", page, flags=re.MULTILINE)
    jobs = sweep("tiny_table", ["name=beyond", f"hydra.searchpath=[file://{FOLDER}/conf]", models])
    found = {word.partition("=")[2] for job in jobs for word in job.words if word.startswith("model=")}
    assert found >= {path.stem for path in (FOLDER / "conf" / "model").glob("*.yaml")} >= set(NAMES)
    assert all("searchpath" in " ".join(job.command) and "hydra" not in job.key for job in jobs)
    with pytest.raises(ValueError, match="model=line_searc is not there"):
        sweep("tiny_table", ["name=beyond", f"hydra.searchpath=[file://{FOLDER}/conf]", "model=line_searc"])
    assert {re.sub("^## ", "", line) for line in page.splitlines() if line.startswith("## ")} >= set(NAMES)


def test_a_wrong_setting_is_a_sentence():
    for name, settings, said in (
        ("line_search", {"regressor__window": 0}, "regressor.window=0 is no number of pairs"),
        ("surprise", {"regressor__budget": -1.0}, "regressor.budget=-1.0 must be at least 0, or null"),
        ("surprise", {"regressor__longest": 0}, "regressor.longest=0 is no number of tokens"),
        ("joined", {"regressor__backend": "fla"}, "regressor.backend=fla: Joined has auto, torch and recurrent"),
    ):
        with pytest.raises(ValueError, match=said):
            experiment(name, **settings)
    assert any(name.startswith("beyond.") for name in sys.modules)
