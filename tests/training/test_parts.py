"""The parts of training that need no run: groups of parameters, schedules, the arithmetic of batches, metrics.csv."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from data.batch import batch_arithmetic, every
from data.tokenizer import Bytes
from models.training import callbacks
from models.training.logger import CsvLogger, read_metrics
from models.training.module import Training, position_ranges
from models.training.optimizer import adamw, clip, muon, orthogonal, parameter_groups
from models.training.run import difference
from models.training.schedule import warmup_cosine, warmup_stable_decay
from models.training.speed import peak_flops
from tests.laws.presets import PRESETS, marked
from tests.test_language_model import model


@pytest.mark.parametrize("preset", marked(PRESETS))
@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay(preset, tied):
    m = model(preset, tie_embeddings=tied)
    decayed, rest = parameter_groups(m, 0.1)
    names = {id(p): name for name, p in m.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {"projection", "output", "up"}
    assert all("decay" not in names[id(p)] and "regressor" not in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(m.parameters()))
    assert adamw(m, lr=1.0).param_groups[1]["weight_decay"] == 0


@pytest.mark.parametrize("preset", marked(PRESETS))
def test_muon_takes_the_matrices_and_nothing_else(preset):
    """By what a parameter is, not by its number of axes: https://github.com/AI-Hypercomputer/maxtext/pull/4843 (of
    filters), https://github.com/KellerJordan/Muon/pull/22, https://github.com/deepspeedai/DeepSpeed/pull/7641."""
    m = model(preset)
    names = {id(p): name for name, p in m.named_parameters()}
    taken, rest = ({names[id(p)] for p in group["params"]} for group in muon(m, lr=1.0).param_groups)
    own = {"probe"} if preset == "parallax" else set()
    assert {name.split(".")[-2] for name in taken} == {"projection", "output", "up"} | own
    assert taken | rest == set(names.values()) and not taken & rest


def trained(optimizer, m, steps):
    """The weights after some steps on a fixed batch."""
    ids = torch.arange(40).view(2, 20)
    for _ in range(steps):
        m(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in m.parameters()]


def test_muon_turns_gradients_into_nearly_orthogonal_matrices():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (40, 16), (16, 16)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert singular.min() > 0.3 and singular.max() < 1.3


def test_muon_is_adamw_for_what_is_no_matrix_and_goes_on_from_its_state():
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    a, b = model("gated_delta").float(), model("gated_delta").float()
    first, plain = muon(a, **settings), adamw(b, **settings)
    after_muon, after_adamw = trained(first, a, 1), trained(plain, b, 1)
    matrices = {id(p) for p in first.param_groups[0]["params"]}
    same = [torch.equal(x, y) for x, y in zip(after_muon, after_adamw, strict=True)]
    assert same == [id(p) not in matrices for p in a.parameters()]
    again = model("gated_delta").float()
    again.load_state_dict(a.state_dict())
    second = muon(again, **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    pairs = zip(trained(first, a, 2), trained(second, again, 2), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_schedules():
    factor = warmup_stable_decay(100, warmup=0.1, decay=0.2)
    values = [factor(t) for t in range(100)]
    assert values[0] == pytest.approx(1 / 11) and values[10:80] == [1.0] * 70
    assert values[99] == pytest.approx(1 / 21) and sorted(values[80:], reverse=True) == values[80:]
    factor = warmup_cosine(100, warmup=0.1, final=0.1)
    values = [factor(t) for t in range(101)]
    assert max(values) == values[10] == 1 and values[100] == pytest.approx(0.1) and values[55] == pytest.approx(0.55)
    with pytest.raises(ValueError, match=r"schedule\.decay=0\.8"):
        warmup_stable_decay(100, warmup=0.5, decay=0.8)


def test_batch_arithmetic():
    batch = batch_arithmetic(4096, 256, 4, 2, 50_000)
    assert (batch.sequences, batch.accumulation, batch.num_steps) == (16, 2, 12)
    assert str(batch).startswith("4,096 tokens a step = 256 tokens x 4 sequences x 2 devices x 2 accumulated; 12 steps")
    assert batch_arithmetic(4096, 256, 100, 2, 50_000).micro_batch == 8  # a limit, not a demand
    assert (every(0.1, 12, "x"), every(0.01, 12, "x"), every(5, 12, "x"), every(50, 12, "x")) == (1, 1, 5, 12)


def test_metrics_are_kept_up_to_the_step_that_is_resumed(tmp_path):
    first = CsvLogger(tmp_path)
    first.resume(0)
    for step in range(6):
        first.log_metrics({"train/loss": 1 / (step + 1), "epoch": 0}, step)
    first.log_metrics({"validation/nats": 0.3}, 5)
    again = CsvLogger(tmp_path)
    again.resume(4)
    again.log_metrics({"train/loss": 0.123456789, "new": 1.0}, 4)
    found = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    assert [row["train/loss"] for row in found] == [1, 1 / 2, 1 / 3, 1 / 4, 0.123456789]
    assert found[-1]["new"] == 1


def test_a_row_that_a_kill_cut_off_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n0,1.5,2.5\n1,3.")
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 0, "a": 1.5, "b": 2.5}, {"step": 1, "a": 3.0}]


def test_difference_names_every_setting_that_counts():
    before = {"seed": 0, "model": {"a": 1, "b": [1, 2]}, "trainer": {"devices": 1}}
    now = {"seed": 0, "model": {"a": 2, "c": 3, "b": [1, 2]}, "trainer": {"devices": 4}}
    assert difference(before, now).splitlines() == ["  model.a: 1 before, 2 now", "  model.c: (absent) before, 3 now"]


def test_position_ranges_cover_the_sequence():
    assert position_ranges(256) == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256)]
    assert position_ranges(10) == [(0, 10)]
    assert position_ranges(100)[-1] == (64, 100)


def test_peaks_are_dense(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda")) == 989e12
    assert peak_flops(torch.device("cpu")) is None


def test_the_sample_ends_where_the_model_ends_it(tmp_path, monkeypatch):
    """It begins with half of the first document, so that no text goes on behind an end; and eos closes it."""
    ids = torch.tensor([*b"one text", 256, *b"another"])
    sample = {"input_ids": ids, "segments": torch.tensor([0] * 9 + [1] * 7)}
    task = SimpleNamespace(tokenizer=Bytes(), validation_samples=lambda: [sample])
    m = model("linear", vocab_size=257, **Bytes().special_ids)
    module = Training(m, adamw, warmup_cosine, num_steps=1, clip_norm=1.0)
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(task=task),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        default_root_dir=tmp_path,
        global_rank=0,
        interrupted=False,
        global_step=1,
        loggers=[],
    )
    letters = iter([*b"!?", 256, *b"never"])
    certain = torch.full((1, 257), -1e9)
    monkeypatch.setattr(callbacks, "_finite", lambda *_: certain.index_fill(1, torch.tensor([next(letters)]), 0.0))
    callbacks.Sample(num_tokens=8).on_fit_end(trainer, module)
    assert (tmp_path / "sample.txt").read_text() == "one !?\n"


@pytest.mark.parametrize("length", [0.3, 1 - 2e-6, 1 - 5e-7, 1.0, 1.5, float("inf"), float("nan")])
def test_clipping_is_torchs_bit_by_bit(length):
    """Also where it leaves out what would change nothing."""
    gradient = torch.randn(100, generator=torch.manual_seed(0))
    ours, theirs = torch.nn.Parameter(torch.zeros(100)), torch.nn.Parameter(torch.zeros(100))
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    norm = torch.tensor(length)
    clip([ours], 1.0, norm, norm.item())
    torch.nn.utils.clip_grads_with_norm_([theirs], 1.0, norm)
    assert torch.equal(ours.grad.view(torch.int32), theirs.grad.view(torch.int32))


def test_short_gradients_are_passed_over(monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", None)
    clip([], 1.0, torch.tensor(0.9), 0.9)
