"""The pages of experiments, from results by hand: tables, published numbers beside ours, and what is drawn."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.automata import SEPARATOR
from scripts.figures import evidence, regbench
from scripts.figures.claims import CLAIMS, scaled
from scripts.figures.published import MAD, STATE_TRACKING
from scripts.figures.results import best, curve, label, points
from scripts.sweeps.jobs import sweep
from scripts.sweeps.results import Results, write
from tests.conftest import ROOT

NEGATIVE = "model.mixers.main.regressor.negative_eigenvalues"
ON, AT = "validation/accuracy_on/", "validation/accuracy_at/"


def result(experiment: str, found: dict[str, float], **settings: Any) -> dict[str, Any]:
    words = [f"experiment={experiment}", *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]
    row = {"job": f"{experiment}/{','.join(words)}", "words": words, "date": "2026-11-29", "commit": "0123456789abcdef"}
    origin = {
        "changed": False,
        "device": "NVIDIA H200",
        "versions": {"python": "3.12", "torch": "2.11"},
        "seconds": 36.0,
    }
    return (
        row | origin | {"command": f"python train.py -m {' '.join(words)}", "state_size": 4096, "parameters": 9} | found
    )


def longer(accuracy: float, chance: float, experiment: str = "state_tracking", **settings: Any) -> dict[str, Any]:
    found = {"validation/chance": chance, f"{ON}longer": accuracy, f"{ON}longer/48-63": 1.0, f"{ON}longer/240-255": 0.5}
    words = {NEGATIVE: settings.pop("negative")} if "negative" in settings else {}
    return result(experiment, found, **settings, **words)


def text_run(experiment: str, loss: float, model: str, seed: int, rate: float) -> dict[str, Any]:
    at = {f"validation/nats_at/{a}": loss + i for i, a in enumerate(("0-15", "16-31", "32-2047"))}
    found = {"validation/nats": loss, "validation/bits_per_byte": loss / 3, "tokens_per_second": 1e6} | at
    found |= {"memory/copied/0": 2.0, "memory/copied/64": 1.0, "memory/seen": loss - 1, "memory/new": loss + 1}
    found |= {"memory/before/0-15": 1.0, "memory/before/16-31": 0.5}
    return result(experiment, found, model=model, seed=seed, optimizer__lr=rate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Results of every experiment: two rates, two seeds, a few mixers."""
    folder = tmp_path_factory.mktemp("evidence")
    every: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("mqar", "mqar_memory", "mad", "needles", "regression", "regbench")
    }
    for model, seed, rate in product(("mesa", "linear"), (1, 2), (1e-3, 1e-2)):
        good = (0.9 if model == "mesa" else 0.5) - (0.2 if rate == 1e-2 else 0) + 0.01 * seed
        settings = {"model": model, "seed": seed, "optimizer__lr": rate}
        for width in (32, 64):
            size = {"state_size": width**2, f"{ON}64x4": good, f"{ON}1024x256": good / 2}
            every["mqar"].append(result("mqar", size, **settings, model__hidden_size=width))
        memory = {f"{ON}{length}x{n}": good - n / 1000 for length in (256, 4096) for n in (64, 128)}
        every["mqar_memory"].append(result("mqar_memory", memory, **settings))
        found = {f"{ON}{length}": good for length in (1024, 8192)} | {"validation/chance": 0.1}
        every["needles"] += [result("needles", found, **settings, data=f"needle_s{i}") for i in (1, 2)]
        found = {"validation/nats_on/longer": 1 - good, "validation/nats_on/longer/0-15": 0.5}
        every["regression"].append(result("regression", found, **settings, data="regression_linear"))
        found = {"validation/accuracy": good, f"{AT}0-15": good / 2, f"{AT}16-959": good, "validation/chance": 1 / 9}
        every["regbench"].append(result("regbench", found, **settings, data__validation_size=3))
        for task in MAD.columns:
            every["mad"].append(result("mad", {"validation/accuracy": good}, **settings, data=task))
    tracked = [(1, "True", 1.0), (2, "True", 0.75), (1, "False", 0.5), (2, "False", 0.5)]
    rows = [longer(x, 0.5, data="parity", model="deltanet", seed=s, negative=n) for s, n, x in tracked]
    every["state_tracking"] = [
        *rows,
        longer(0.6, 0.2, data="modular_brackets", model="deltanet", seed=1, negative=True),
    ]
    every["state_tracking_others"] = [longer(0.5, 0.5, "state_tracking_others", data="parity", model="softmax", seed=1)]
    every["word_problems"] = [
        longer(1.0, 1 / 6, "word_problems", data="s3", model="delta_product", seed=1, negative="True")
    ]
    text = {"mesa": 1.85, "titans_mag": 1.75, "lstm": 2.25, "mine": 1.95}
    every["tiny_table"] = [
        result("tiny_table", {"validation/bits_per_byte": x + seed / 100}, model=name, seed=seed)
        for (name, x), seed in product(text.items(), (1, 2))
    ]
    losses = {"mesa": 3.0, "softmax": 3.1, "titans": 2.9}
    for name, rates in (("ablation", (1e-3,)), ("ablation_170m", (1e-3,)), ("ablation_rates", (1e-3, 2e-3))):
        each = product(losses, (1, 2), rates)
        every[name] = [
            text_run(name, losses[model] + rate + 0.01 * seed, model, seed, rate) for model, seed, rate in each
        ]
    window = text_run("ablation_windows", 4.0, "softmax", 1, 1e-3)
    window["words"].append("model.mixers.main.regressor.window=64")
    every["ablation_windows"] = [window]
    convolution = text_run("ablation_convolutions", 3.2, "gla", 1, 1e-3)
    convolution["words"].append("model.mixers.main.conv_size=4")
    every["ablation_convolutions"] = [convolution]
    gate = text_run("ablation_gates", 3.3, "kda", 1, 1e-3)
    gate["words"].append("model.mixers.main.output_gate=silu")
    every["ablation_gates"] = [gate]
    found = {key: x for key, x in text_run("gates", 5.0, "kda", 1, 4e-3).items() if "/" in key}
    starts = [{"model__mixers__main__decay__half_lives": start} for start in ("null", "[22,2840]")]
    every["gates"] = [result("gates", found, model="kda", seed=1, **start) for start in starts]
    around = {"output_gates": ("output_gate", "silu"), "convolutions": ("conv_size", "4")}
    for name, (setting, value) in around.items():
        every[name] = [result(name, found, model="gla", seed=1, **{f"model__mixers__main__{setting}": value})]
    decay = text_run("decays", 3.1, "kda", 1, 4e-3)
    decay["words"].append("decay@model.mixers.main.decay=scalar")
    every["decays"] = [decay]
    for name, rows in every.items():
        (folder / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "results.jsonl").write_text(lines)
    (folder / "mad" / "notes.md").write_text("Memorization is lower here, since nothing was tuned.\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_a_page_is_written_from_the_results_alone(name, folder):
    table = evidence.write(name, folder)
    page, picture = (folder / name / "README.md").read_text(), (folder / name / "figure.svg").read_text()
    held = (folder / name / "table.json").read_text()
    assert "NaN" not in held and json.loads(held) == json.loads(json.dumps([evidence.plain(row) for row in table]))
    assert (folder / name / "table.txt").read_text() == evidence.text(table)
    assert all(line in page for line in evidence.markdown(table)) and "![" in page
    assert f"python scripts/figures/evidence.py {name}\n" in page and "NVIDIA H200" in page and "0123456789" in page
    assert all(len(line) < 200 or line.startswith(("|", "*")) for line in page.splitlines())
    assert len(picture) < 100_000 and all(row["mixer"] in picture for row in table)
    if name == "mad":
        evidence.write(name, folder)
        assert (folder / name / "figure.svg").read_text() == picture, "drawn again, it is the same"


def test_runs_of_other_settings_are_not_taken_for_seeds(folder, tmp_path):
    """A quick trial with few tokens, say, in the file of the sweep."""
    rows = [json.loads(line) for line in (folder / "mqar" / "results.jsonl").read_text().splitlines()]
    rows.append(rows[0] | {"words": [*rows[0]["words"], "tokens=20000"]})
    (tmp_path / "mqar").mkdir()
    (tmp_path / "mqar" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="16 of mqar with those of the sweep; 1 of mqar with tokens=20000"):
        evidence.read(CLAIMS["mqar"], tmp_path)
    (tmp_path / "ablation").mkdir()
    few = [text_run("ablation", 3.0, "mesa", 1, 1e-3)]
    window = json.loads((folder / "ablation_windows" / "results.jsonl").read_text())
    write(tmp_path / "ablation_windows" / "results.jsonl", [window])
    write(tmp_path / "ablation" / "results.jsonl", [row | {"words": [*row["words"], "tokens=10"]} for row in few])
    with pytest.raises(ValueError, match="1 of ablation with tokens=10; 1 of ablation_windows with those of the sweep"):
        evidence.read(CLAIMS["ablation"], tmp_path)
    for more in (["a=1", "b=2"], ["b=2", "a=1", "strategy=ddp"]):
        assert evidence.beyond("mqar", rows[0] | {"words": [*rows[0]["words"], *more]}) == "a=1 b=2", "in any order"
    with pytest.raises(ValueError, match=r"results\.jsonl has a run of experiment=mqar, which is not mad"):
        (tmp_path / "mqar").rename(tmp_path / "mad")
        evidence.read(CLAIMS["mad"], tmp_path)
    (tmp_path / "mad").rename(tmp_path / "mqar")
    with (tmp_path / "mqar" / "results.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match="line 18, is not the line of a result"):
        evidence.read(CLAIMS["mqar"], tmp_path)


def test_a_sweep_that_is_half_done_says_what_is_missing(folder, tmp_path):
    """Runs of other seeds, settings that change no result, one that failed, and one that has lost all numbers."""
    keep, words = ("deltanet", "softmax"), ["micro_batch=8", "compile=false"]
    rows = [text_run("ablation_rates", 3.0, model, seed, 2e-3) for model in keep for seed in (1, 2)]
    rows[0]["words"] += words
    rows.append(text_run("ablation_rates", math.nan, "deltanet", 1, 4e-3))
    (tmp_path / "ablation_rates").mkdir()
    results = Results(tmp_path / "ablation_rates" / "results.jsonl")
    write(results.path, [row | {"words": [w.replace("0.001", "1e-3") for w in row["words"]]} for row in rows])
    (job,) = sweep("ablation_rates", ["model=mesa", "optimizer.lr=2e-3"])
    results.fail(job, "error: out of luck")
    evidence.write("ablation_rates", tmp_path)
    page = (tmp_path / "ablation_rates" / "README.md").read_text()
    assert "| deltanet | 1.000 | diverged | 0.002 | yes |" in page and "| softmax | 1.000 |  | 0.002 |" in page
    assert "* `seed=1 model=mesa optimizer.lr=0.002`: error: out of luck" in page
    assert "has 3 of the 51 runs of `ablation_rates`, and 2 beside them" in page
    assert "* no result yet of `ablation_rates`: softmax (2 of 3 runs), gated_delta, mesa, titans," in page
    assert "ablation_rates --at-once 3 --minutes 9 seed=1,2\n" in page and "in the place of" not in page
    assert "* rates that were run: softmax 1, deltanet 2\n" in page


@pytest.mark.parametrize("name", CLAIMS)
def test_a_run_that_has_lost_all_numbers_is_drawn(name, folder, tmp_path):
    """And is not the best of its rates; with one run alone, the page says that it has diverged."""
    for source in CLAIMS[name].sources:
        rows = Results(folder / source / "results.jsonl").read()
        lost = {key: math.nan for key in rows[0] if "nats" in key or "bits" in key or key.startswith("memory/")}
        (tmp_path / source).mkdir()
        write(tmp_path / source / "results.jsonl", [rows[0] | lost, *rows[1:]])
    table = evidence.write(name, tmp_path)
    assert len(table) >= 1 and "nan" not in (tmp_path / name / "README.md").read_text().lower()


def test_the_best_rate_counts_and_seeds_are_averaged(folder):
    rows = evidence.read(CLAIMS["mqar"], folder)
    table = {(row["mixer"], row["width"]): row for row in CLAIMS["mqar"].table(rows)}
    row = table["mesa", 64]
    assert row["rate"] == "0.001" and row["seeds"] == 2 and row["state"] == 4096
    assert row["64x4"] == pytest.approx(0.915) and row["mean"] == pytest.approx(0.75 * 0.915)
    chosen = best(rows, label, CLAIMS["mqar"].measure)
    assert set(chosen) == {"mesa", "linear"} and len(chosen["mesa"]) == 4  # two widths, two seeds
    memory = CLAIMS["mqar_memory"].table(evidence.read(CLAIMS["mqar_memory"], folder))
    assert memory[1]["4096x128"] == pytest.approx(0.915 - 0.128) and memory[1]["spread"] == pytest.approx(0.01)


def test_of_losses_the_smallest_is_the_best(folder):
    rows = evidence.read(CLAIMS["regression"], folder)
    table = {row["mixer"]: row for row in CLAIMS["regression"].table(rows)}
    assert table["mesa"]["linear"] == pytest.approx(1 - 0.915) and table["mesa"]["seeds"] == 2
    assert curve(rows[0], "longer") == {7.5: 0.5}


def test_languages_have_n_grams_that_learn_nothing_beside_the_mixers(folder):
    """Which know of a word only what this sequence has shown: of `a b | a c | a b | a`, say, that b is likely."""
    a, b, c = 1, 2, 3
    tokens = np.array([a, b, SEPARATOR, a, c, SEPARATOR, a, c, SEPARATOR, a, b])
    asked = np.array([1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0], dtype=bool)
    assert regbench.guesses(tokens, asked, 2)[asked].tolist() == [a, a, b, a, b, a, c]
    assert regbench.guesses(tokens, asked, 1)[asked].tolist() == [a] * 7
    inner = np.array([a, b, a, c, a, b, a])  # behind b comes a, behind `a b a` c
    assert regbench.guesses(inner, np.arange(7) == 6, 2)[6] == b
    assert regbench.guesses(inner, np.arange(7) == 6, 4)[6] == c
    table = CLAIMS["regbench"].table(evidence.read(CLAIMS["regbench"], folder))
    rows = {row["mixer"]: row for row in table}
    assert rows["mesa"]["accuracy"] == pytest.approx(0.915) and rows["mesa"]["0-15"] == pytest.approx(0.4575)
    assert rows["mesa"]["rate"] == "0.001" and rows["mesa"]["spread"] == pytest.approx(0.01)
    two, three, four = (rows[f"{n}-gram, counted"] for n in regbench.ORDERS)
    assert 0.5 < two["accuracy"] < three["accuracy"] <= four["accuracy"] < 1 and two["0-15"] < two["16-959"]


def test_all_presets_are_in_one_table_and_its_sweep(folder):
    """The best first, and each with its branch."""
    table = CLAIMS["tiny_table"].table(evidence.read(CLAIMS["tiny_table"], folder))
    assert [(row["mixer"], row["branch"]) for row in table] == [
        ("titans_mag", "linear"),
        ("mesa", "least_squares"),
        ("mine", "other"),
        ("lstm", "no regression"),
    ]
    assert table[0]["bits per byte"] == "1.765" and table[0]["between seeds"] == "0.010" and table[0]["seeds"] == 2
    models = {word.partition("=")[2] for job in sweep("tiny_table", []) for word in job.words if "model=" in word}
    assert models == {path.stem for path in (ROOT / "conf" / "mixer").rglob("*.yaml")} | {"in_place"}


def test_what_models_remember_is_a_mean_over_seeds_of_those_that_were_looked_into(folder, tmp_path):
    rows = Results(folder / "ablation" / "results.jsonl").read()
    softmax = [{k: x for k, x in row.items() if "before" not in k} for row in rows if "model=softmax" in row["words"]]
    titans = [{k: x for k, x in row.items() if "memory" not in k} for row in rows if "model=titans" in row["words"]]
    softmax[1]["memory/copied/64"] = 2.0
    write(tmp_path / "ablation" / "results.jsonl", [row for row in rows if "model=mesa" in row["words"]] + softmax)
    claim = CLAIMS["ablation_memory"]
    mesa, other = claim.table(evidence.read(claim, tmp_path))
    assert mesa["seeds"] == 2 and mesa["pair seen"] == pytest.approx(mesa["nats per token"] - 1)
    assert other["copied, 64"] == 1.5 and (other["inner loss, 0-15"], mesa["inner loss, 16-31"]) == (None, 0.5)
    write(tmp_path / "ablation" / "results.jsonl", softmax[:1] + titans)
    evidence.write("ablation_memory", tmp_path)
    page = (tmp_path / "ablation_memory" / "README.md").read_text()
    assert "has 1 of the 17 runs of `ablation`" in page and "`ablation`: gated_delta, mesa, titans," in page
    write(tmp_path / "ablation" / "results.jsonl", titans)
    with pytest.raises(ValueError, match=r"no results with memory/seen yet; python scripts/memory\.py ablation makes"):
        evidence.read(claim, tmp_path)


def test_the_ablation_has_places_beside_the_published_ones(folder):
    """Among the mixers that both have; seeds are averaged, and a window is a mixer of its own."""
    table = CLAIMS["ablation"].table(evidence.read(CLAIMS["ablation"], folder))
    assert [row["mixer"] for row in table] == ["titans", "mesa", "softmax", "gla convolution", "kda silu", "softmax 64"]
    places = [(row["place"], row["their place"]) for row in table]
    assert places == [(None, None), (1, 1), (2, 2), (None, None), (None, None), (3, 3)]
    assert table[1]["seeds"] == 2 and table[1]["spread"] == pytest.approx(0.01 / 3)
    rates = {
        row["mixer"]: row for row in CLAIMS["ablation_rates"].table(evidence.read(CLAIMS["ablation_rates"], folder))
    }
    assert rates["mesa"]["best"] == "0.001" and rates["mesa"]["0.002"] == pytest.approx(3.017 / 3)
    assert "--rates ablation_rates --times 0.75" in evidence.page(
        "ablation", CLAIMS["ablation"], *[[window_row()]] * 2, ""
    )


def window_row() -> dict[str, Any]:
    return text_run("ablation", 4.0, "softmax", 1, 1e-3)


def test_scaled_accuracy_and_curves(folder):
    rows = evidence.read(CLAIMS["state_tracking"], folder)
    assert [label(row) for row in rows[::2]] == ["deltanet [0, 1]", "deltanet [-1, 1]", "deltanet [-1, 1]"], (
        "in the order of the sweep, and not in that in which runs ended"
    )
    assert scaled(rows[3]) == 0.5 and scaled(rows[4]) == pytest.approx(0.5) and points(rows[2]) == {"longer": 1.0}
    assert curve(rows[0], "longer") == {55.5: 1.0, 247.5: 0.5}
    table = {row["mixer"]: row for row in CLAIMS["state_tracking"].table(rows)}
    assert table["deltanet [-1, 1]"]["parity"] == 1.0 and table["deltanet [-1, 1]"]["parity, mean"] == 0.75
    assert table["softmax"]["parity"] == 0 and table["softmax"]["modular_brackets"] is None


def test_published_numbers_stand_beside_ours(folder):
    evidence.write("mad", folder)
    page = (folder / "mad" / "README.md").read_text()
    assert "Ours, and those of MesaNet" in page and "| mesa | 91.5, 100 |" in page
    assert "* mesa, mad compression: 91.5 here, 45.4 there." in page and "since nothing was tuned" in page
    evidence.write("state_tracking", folder)
    page = (folder / "state_tracking" / "README.md").read_text()
    assert "| deltanet [-1, 1] | 1.000, 1.000 | -, 0.971 | 0.500, 0.260 |" in page
    assert "* deltanet [-1, 1], modular brackets: 0.500 here, 0.260 there." in page and "parity:" not in page


def test_what_is_published_names_what_is_here():
    models = {path.stem for path in (ROOT / "conf/model").glob("*.yaml")}
    assert set(MAD.of) <= models and {name.partition(" [")[0] for name in STATE_TRACKING.of} <= models
    for name, claim in CLAIMS.items():
        assert any(name.startswith(source) for source in claim.sources)
        assert all((ROOT / f"conf/experiment/{source}.yaml").exists() for source in claim.sources)
        if claim.published:
            assert all(len(of) == len(claim.published.columns) for of in claim.published.of.values())
            assert all((ROOT / f"conf/data/{task}.yaml").exists() for task in claim.published.columns)


def test_without_results_it_says_what_makes_them(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evidence.py", "mqar", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"mqar has no results yet; python scripts/evidence.py makes them"):
        evidence.main()
    assert Results(tmp_path / "none").read() == []


def test_a_result_that_lacks_a_number_is_named(tmp_path, monkeypatch):
    """By its line, and a folder that is not there by its setting; a setting that is taken away has no value."""
    whole = result("tiny_table", {"validation/bits_per_byte": 2.0}, model="mesa", seed=1)
    lacking = [{key: x for key, x in whole.items() if "bits" not in key}, whole | {"validation/bits_per_byte": "two"}]
    for row, says in zip(lacking, ("is of a run without validation/bits_per_byte", "can't be drawn"), strict=True):
        write(tmp_path / "tiny_table" / "results.jsonl", [whole | {"words": [*whole["words"], "~logger"]}, row])
        with pytest.raises(ValueError, match=f"results.jsonl, line 2, {says}"):
            evidence.write("tiny_table", tmp_path)
    monkeypatch.setattr("sys.argv", ["evidence.py", "mqar", "--folder", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"error: --folder=.*none is no folder"):
        evidence.main()


STORED = [page for page in sorted((ROOT / "docs" / "evidence").glob("*/README.md")) if page.parent.name in CLAIMS]


@pytest.mark.parametrize("page", STORED, ids=lambda p: p.parent.name)
def test_stored_pages_are_up_to_date(page):
    """With the results that lie beside them."""
    name = page.parent.name
    claim = CLAIMS[name]
    table = claim.table(evidence.read(claim, page.parents[1]))
    assert all(line in page.read_text() for line in evidence.markdown(table)), f"scripts/figures/evidence.py {name}"
    assert (page.parent / "table.txt").read_text() == evidence.text(table)
