"""The page of an ablation: its numbers by hand, what it takes for a variant, and a file that needs no other."""

from __future__ import annotations

import csv
import json
import math
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from models.training.sweep import Outcome
from scripts import report
from scripts.reports import evaluations, figures, inner, intervals, presets, runs, tables, variants
from tests.laws.presets import recipes

MODEL = {"hidden_size": 96, "num_layers": 4, "num_heads": 3, "pattern": ["main"], "feed_forward": "swiglu"}
CONFIG = {
    "name": "ablation",
    "seed": 1,
    "data": {"_target_": "data.text.Text", "name": "some_text"},
    "optimizer": {"_target_": "models.training.optimizer.adamw", "_partial_": True, "lr": 0.0025, "betas": [0.9, 0.95]},
    "trainer": {"devices": 1},
    "seq_len": 32,
    "batch_tokens": 100,
    "tokens": 400,
    "validate_every": 0.5,
}


def mixer(name: str, **changes: object) -> dict:
    return presets.composed(name) | {"num_heads": 3} | changes


def run(folder: Path, mixers: dict | str, value: float | None, seed: int = 1, rows: int = 4, **changes) -> Path:
    """A run's folder, by hand. value: bits per byte of its end, None for one that is not finished; changes: of its
    config."""
    model = MODEL | {"mixers": {"main": mixer(mixers)} if isinstance(mixers, str) else mixers}
    config = deepcopy(CONFIG) | {"model": model, "seed": seed, "run_dir": str(folder)} | changes
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    end = 3.0 if value is None else value
    metrics = [
        {
            "step": step,
            "speed/tokens_per_second": 50.0 * (1 + step % 2),
            "progress/tokens": 100.0 * (step + 1),
            "progress/flops": 1e6 * (step + 1),
            "validation/nats": end + 3 - step,
            "validation/bits_per_byte": end + 3 - step,
        }
        for step in range(rows)
    ]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, metrics[0])
        writer.writeheader()
        writer.writerows(metrics)
    if value is not None:
        at = {"validation/nats_at/0-15": 1.5 * value, "validation/nats_at/16-31": value}
        numbers = {"tokens": 400, "flops": 4e6, "parameters": 1000, "state_size": 64, "tokens_per_second": 50.0}
        where = {"commit": "0123456789abcdef", "changed": False, "device": "cpu", "versions": {"torch": "2"}}
        result = {"validation/nats": value, "validation/bits_per_byte": value, **at, **numbers, **where}
        (folder / "result.json").write_text(json.dumps(result | {"command": f"python train.py -m seed={seed}"}))
        (folder / "sample.txt").write_text(f"{folder.name} <b>goes</b> on & on\n")
    return folder


class Page(HTMLParser):
    """What a page refers to, its tables, and whether its tags close."""

    VOID = ("meta", "line", "path", "use", "rect", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.references, self.ids, self.open = [], [], []
        self.rows: list[list[str]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def compared(*folders: Path) -> variants.Comparison:
    return variants.compare(runs.find(list(folders)))


# the numbers


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_student_t(freedom, quantile):
    """As in any book's table, such as https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm."""
    assert intervals.t_quantile(freedom, 0.975) == pytest.approx(quantile, abs=5e-5)


def test_intervals():
    assert intervals.interval([2.0, 2.1, 2.3]) == pytest.approx((6.4 / 3, 4.3026527 * 0.15275252 / math.sqrt(3), 3))
    assert intervals.interval([2.0]) == (2.0, None, 1)
    assert intervals.interval([2.0, math.nan])[1] is None
    # by pairs: 0.1 and 0.2 less, though the seeds themselves are one apart
    assert intervals.paired({1: 2.0, 2: 3.0, 3: 9.0}, {1: 2.1, 2: 3.2}) == pytest.approx((-0.15, 12.7062047 * 0.05, 2))


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Path:
    """Two mixers, two seeds, softmax with a third; one that stopped, one that is not finite, one that failed."""
    folder = tmp_path_factory.mktemp("report") / "ablation"
    for seed, (softmax, delta) in enumerate([(2.0, 1.9), (2.2, 2.0)], 1):
        run(folder / f"a-{seed}", "softmax", softmax, seed)
        run(folder / f"b-{seed}", "gated_delta", delta, seed)
    run(folder / "a-3", "softmax", 2.1, 3)
    run(folder / "c-1", "mesa", math.nan, 1)
    run(folder / "d-1", "titans", None, 1, rows=2)
    runs.keep_failures(folder, {folder / "e": (["model=<gone>"], "ValueError: no"), folder / "a-1": ([], "")})
    return folder


def test_the_table(ablation):
    comparison = compared(ablation)
    assert [variant.label for variant in comparison.variants] == ["gated_delta", "softmax", "mesa"]
    assert comparison.metric == "validation/bits_per_byte"
    table = tables.results(comparison)
    # 1.95 +- 12.706 * 0.0707107 / sqrt(2); 2.1 +- 4.3027 * 0.1 / sqrt(3); differences -0.1 and -0.2
    assert table.rows[0][:5] == ["gated_delta", "2", "1.950 ± 0.635", "1.900, 2.000", "−0.150 ± 0.635"]
    assert table.rows[1][:5] == ["softmax", "3", "2.100 ± 0.248", "2.000, 2.200, 2.100", "–"]
    assert table.rows[2][:5] == ["mesa", "1", "not finite", "nan", "not finite"]
    assert table.rows[0][5:] == ["1,000", "64", "10k", "50"]
    assert tables.by_position(comparison).rows[0][1:] == ["2.925 ± 0.953", "1.950 ± 0.635"]
    assert tables.text(table).splitlines()[1].split()[:4] == ["gated_delta", "2", "1.950", "±"]


def test_time_is_tokens_by_speed():
    """100 tokens at 50 a second, 100 at 100; a validation between two reports, and one after the last."""
    rows = [
        {"step": 0, "progress/tokens": 100, "speed/tokens_per_second": 50},
        {"step": 1, "progress/tokens": 150, "validation/nats": 1},
        {"step": 2, "progress/tokens": 200, "speed/tokens_per_second": 100},
        {"step": 3, "progress/tokens": 300, "validation/nats": 1},
    ]
    record = runs.Record(Path("a"), {}, rows, None)
    assert [row["seconds"] for row in record.validations] == [2.5, 4.0]
    (alone,) = runs.Record(Path("a"), {}, rows[1:2], None).validations
    assert math.isnan(alone["seconds"])


# variants


def test_what_differs_is_read_from_the_configs(tmp_path):
    """Whatever the folders are called; settings that change no number, and those that follow from a class, are none."""
    window = mixer("softmax")
    window["regressor"] = window["regressor"] | {"window": 16}
    sgd = {"_target_": "own.sgd", "_partial_": True, "lr": 0.1}
    run(tmp_path / "z", "softmax", 2.0)
    run(tmp_path / "y", {"main": window}, 2.1, trainer={"devices": 2}, micro_batch=3, validate_every=0.1)
    run(tmp_path / "x", "softmax", 2.2, optimizer=sgd)
    run(tmp_path / "w", {"main": mixer("softmax"), "unused": mixer("mesa")}, 2.3, seed=2)
    hybrid = MODEL | {"mixers": {"a": mixer("gated_delta"), "b": window}, "pattern": ["a", "a", "b"]}
    run(tmp_path / "v", "softmax", 2.4, model=hybrid)
    comparison = compared(tmp_path)
    labels = {"".join(run.folder.name for run in variant.runs): variant.label for variant in comparison.variants}
    assert labels == {
        "zw": "softmax, optimizer=adamw",
        "y": "softmax, optimizer=adamw, window=16",
        "x": "softmax, optimizer=sgd",
        "v": "2 gated_delta, softmax, optimizer=adamw",
    }
    differ = {"mixer", "regressor.window", "b.regressor.window", "optimizer._target_"}
    assert all(variant.settings.keys() == differ for variant in comparison.variants)
    assert comparison.common["data.name"] == "some_text"


def test_one_seed_twice_is_counted_once(tmp_path):
    run(tmp_path / "a", "softmax", 2.0)
    run(tmp_path / "b", "softmax", 2.0, name="again")
    comparison = compared(tmp_path)
    assert [len(variant.runs) for variant in comparison.variants] == [1]
    assert [(a.folder.name, b.folder.name) for a, b in comparison.twice] == [("b", "a")]


def test_a_mixer_that_no_preset_is(tmp_path):
    own = {"_target_": "own.Mixer", "regressor": {"_target_": "own.Mine", "size": 3}, "num_heads": 3}
    name, others = presets.nearest(own)
    assert name == "Mine" and others["regressor.size"] == 3
    assert presets.nearest(presets.composed("titans_mag")) == ("titans_mag", {})
    assert presets.nearest(presets.composed("moneta")) == ("moneta", {})
    assert presets.nearest(presets.composed("lstm") | {"width": 8}) == ("lstm", {"width": 8})
    # another decay than its preset's is a setting
    assert presets.nearest(mixer("titans", decay={"_target_": "own.Decay"})) == (
        "titans",
        {"decay._target_": "own.Decay"},
    )


def test_the_classes_of_every_preset_are_those_that_hydra_composes():
    """Read from the lists of defaults alone, also where a part begins with another of its group, as efla does."""
    for name, recipe in recipes().items():
        composed = {path: value for path, value in presets.leaves(recipe) if path.endswith("_target_")}
        assert presets.all_classes()[name] == composed, name
    for name in ("efla", "yaad", "gated_softmax"):
        assert presets.nearest(presets.composed(name)) == (name, {})


# the page


def test_the_page_needs_no_other_file_and_names_what_is_missing(ablation):
    path, table = report.write([ablation])
    assert path == ablation / "report.html" and "1.950 ± 0.635" in table
    page = Page(path)
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert "url(http" not in page.text and "@import" not in page.text and "<script" not in page.text
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert page.text.count("<svg viewBox") == 3 + 6  # the legend; three curves, two of positions, one of states
    assert "#0303" not in page.text and "#0101" not in page.text and "prefers-color-scheme" in page.text
    shown = {row[0]: row for row in page.rows}
    assert ["gated_delta", "2", "1.950 ± 0.635", "1.900, 2.000", "−0.150 ± 0.635"] in [row[:5] for row in page.rows]
    assert shown["d-1"][1:] == ["titans", "1", "stopped, or still running, after 200 of 400 tokens"]
    assert shown["e"][1] == "model=<gone>" and shown["e"][3] == "failed before it began: ValueError: no"
    assert "model=&lt;gone&gt;" in page.text and "<gone>" not in page.text and "<b>goes" not in page.text
    assert "The result is not finite: c-1" in page.text and "do not have the same seeds" in page.text
    assert "python train.py -m seed=2" in page.text and "0123456789" in page.text


def test_names_and_texts_that_are_no_html(tmp_path):
    name = "a<i>&\"'$x_1$"
    run(tmp_path / name, "softmax", 2.0, data={"_target_": "own.Data", "name": "</style><script>$"})
    run(tmp_path / "b", "mesa", 2.1, data={"_target_": "own.Data", "name": "$\\frac$"})
    page = Page(report.write([tmp_path])[0])
    assert "<script" not in page.text and "<i>" not in page.text and "&lt;i&gt;" in page.text
    assert "$\\frac$" in page.text


def test_one_run_is_a_page_too(tmp_path):
    """Without softmax to compare with, positions, sizes or a speed, as of an older run; its last row cut off."""
    folder = run(tmp_path / "one", "gla", 2.0, rows=1)
    result = {key: value for key, value in json.loads((folder / "result.json").read_text()).items() if "_at" not in key}
    for key in ("state_size", "command", "versions", "commit", "device", "tokens_per_second"):
        del result[key]
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "sample.txt").unlink()
    text = (folder / "metrics.csv").read_text().replace("50.0", "")
    (folder / "metrics.csv").write_text(text + "1,7e-")
    page = Page(report.write([folder])[0])
    assert "minus softmax" not in page.text and "its command was not recorded" in page.text
    assert ["gla", "1", "2.000", "2.000", "1,000", "–", "10k", "–"] in page.rows


def test_many_variants_share_what_colours_there_are(tmp_path):
    for i in range(11):
        run(tmp_path / f"{i}", "gla", 2 + i / 10, optimizer=CONFIG["optimizer"] | {"lr": i / 1000})
    page = Page(report.write([tmp_path])[0])
    assert "3 others" in page.text and "lr=0.01" in page.text


def looked(step: int, layer: int, recall: list, half_life: list | None) -> str:
    """A line of regression.jsonl, of two heads, three ages and one range of positions."""
    row = {"step": step, "tokens": 100 * (step + 1), "layer": layer, "part": "", "mixer": "main", "regressor": "Delta"}
    row |= {"positions": [[0, 16]], "before": [[0.5], [0.7]], "after": [[0.0], [None]], "ages": [0, 1, 2]}
    row |= {"recall": recall, "recall_before": [0.1, 0.3], "loss": [[0.1] * 3] * 2, "loss_before": [0.5, 0.7]}
    row |= {"quantities": {} if half_life is None else {"half_life": half_life, "solver_steps": 3}, "quantiles": {}}
    return json.dumps(row) + "\n"


def test_the_inner_regression_side_by_side(tmp_path):
    """Of the newest validation; a line cut off; heads of which nothing is known; a variant that did not look."""
    folders = {name: run(tmp_path / name, name, 2.0) for name in ("softmax", "gated_delta", "gla")}
    old = looked(0, 0, [[9.0] * 3] * 2, [99.0, 99.0])
    new = [looked(1, 0, [[1.0, 0.5, None], [0.8, 0.3, 0.1]], [4.0, None]), looked(1, 1, [[1.0] * 3] * 2, [8.0, 6.0])]
    (folders["gated_delta"] / inner.FILE).write_text(old + "".join(new) + '{"step": 2')
    (folders["softmax"] / inner.FILE).write_text(looked(1, 0, [[1.0, 1.0, 1.0]] * 2, None))
    found = inner.inner(compared(tmp_path))
    assert found.table.head == ["quantity", "gated_delta", "softmax"] and "gla" in found.says
    assert found.table.rows == [["half life", "6 (4 to 8)", "–"], ["solver steps", "3", "–"]]
    rows = [row for row in inner.read(runs.read(folders["gated_delta"])) if row["last"]]
    assert inner._columns(rows, "ages", "recall") == pytest.approx({0: 0.95, 1: 0.7, 2: 0.7})
    assert inner._columns(rows, "positions", "after") == {(0, 16): 0.0}
    page = Page(report.write([tmp_path])[0])
    assert "What is recalled of a pair" in page.text and "Layer 1" in page.text and len(page.ids) == len(set(page.ids))


def test_ticks_are_round_numbers_of_the_unit(tmp_path):
    """Of minutes too, 1.66667 of which would stand one over the other; and a decade of losses has more than its end."""
    metrics = run(tmp_path / "slow", "softmax", 2.0) / "metrics.csv"
    metrics.write_text(metrics.read_text().replace(",50.0,", ",0.5,"))  # 200 s for each 100 tokens
    time = figures.curves(compared(tmp_path))[2]
    ticks = re.findall(r">([\d.]+)</text>", time.svg)
    assert "minutes of training" in time.svg and len(ticks) > 6 and max(map(len, ticks)) < 5

    axes = Figure().subplots()
    axes.plot([0, 1], [0.03, 0.4])
    inner._loss_axis(axes)
    shown = {label.get_text() for label in axes.get_yticklabels()}
    assert shown > {"0.05", "0.1", "0.2", "0.5", "1"} and not list(axes.yaxis.get_minorticklocs())


def test_evaluations(tmp_path):
    """Lengths with their intervals, and tasks; of runs that have them."""
    for name, seed, value in (("softmax", 1, 2.0), ("softmax", 2, 2.2), ("gla", 1, 2.4)):
        folder = run(tmp_path / f"{name}-{seed}", name, value, seed) / "evaluations"
        folder.mkdir()
        rows = [{"length": 32 * n, "nats": 9.0, "bits_per_byte": value + n} for n in (1, 4)]
        (folder / "validation.json").write_text(json.dumps({"lengths": rows}))
        if seed == 1:
            (folder / "tasks-mine.json").write_text(json.dumps({"tasks": {"mine": {"acc": value / 4}}}))
    tasks, lengths = evaluations.evaluations(compared(tmp_path))
    assert lengths.table.head == ["variant", "32 tokens", "128 tokens"] and len(lengths.pictures) == 1
    assert lengths.table.rows == [["softmax", "3.100 ± 1.271", "6.100 ± 1.271"], ["gla", "3.400", "6.400"]]
    assert tasks.table.head == ["variant", "mine: acc"] and tasks.table.rows == [["softmax", "0.500"], ["gla", "0.600"]]
    page = Page(report.write([tmp_path])[0])
    assert "Evaluation: tasks-mine" in page.text and "Against the length" in page.text


# mistakes, in one sentence


def test_mistakes(ablation, tmp_path, monkeypatch):
    def refused(*folders: Path) -> str:
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, folders)])
        with pytest.raises(SystemExit) as stop:
            report.main()
        return stop.value.code

    near = ablation.parent / "abaltion"
    assert refused(near) == f"error: {near} is not a folder; did you mean {ablation}?"
    assert refused(ablation / "a-1" / "result.json").endswith("result.json is not a folder")
    assert refused(tmp_path) == f"error: {tmp_path} holds no run: a folder with config.yaml"
    (tmp_path / "config.yaml").write_text("theme: dark\n")
    assert refused(tmp_path) == f"error: {tmp_path} holds no run: a folder with config.yaml"
    run(tmp_path / "a", "softmax", None)
    assert refused(tmp_path).startswith(f"error: none of the 1 runs in {tmp_path} is finished")


# at the end of a sweep


def test_a_sweep_ends_in_a_page_and_keeps_what_failed(tmp_path):
    jobs = [run(tmp_path / "s" / "a", "softmax", 2.0), tmp_path / "s" / "b"]
    outcomes = [
        Outcome(["model=softmax"], jobs[0], "fine", False),
        Outcome(["model=none"], jobs[1], "OSError: no", True),
    ]
    said = report.of_sweep(outcomes)
    page = tmp_path / "s" / "report.html"
    assert said.endswith(f"page      {page}") and "failed before it began: OSError: no" in page.read_text()
    report.write([tmp_path / "s"])
    assert "failed before it began: OSError: no" in page.read_text()
    run(jobs[1], "gla", 2.1)
    report.of_sweep([Outcome(["model=none"], jobs[1], "fine", False)])
    assert "failed" not in Page(page).text.split("<main>")[1]


def test_a_sweep_over_models_without_a_name_has_its_page_above_them(tmp_path):
    folders = [run(tmp_path / name / "seed=1", name, 2.0) for name in ("softmax", "gla")]
    run(tmp_path / "other", "mesa", 2.0)
    said = report.of_sweep([Outcome([f"model={f.parent.name}"], f, "fine", False) for f in folders])
    assert said.endswith(f"page      {tmp_path / 'report.html'}") and "mesa" not in said
