"""Recomputed blocks change no number, hold less, and are as few as fit.

Users of others find by trial how many layers to recompute: https://github.com/pytorch/pytorch/issues/194696
"""

from __future__ import annotations

import ast

import pytest
import torch

from models.training.recompute import GIB, Recompute, choose, measure, plan
from scripts.benchmarks.contenders import model_of
from scripts.recipes import composed
from tests.conftest import ROOT

SMALL = ("size=tiny", "model.hidden_size=32", "model.num_heads=2", "model.num_layers=3")


def model(preset, *settings):
    return model_of(composed(preset, *SMALL, *settings), vocabulary=37).train()


def batch(T=24, device="cpu"):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(37, (2, T), generator=draw)
    segments = (torch.arange(T) >= T // 3).long().expand(2, T)
    return tuple(x.to(device) for x in (ids, ids.roll(-1, 1), segments))


def gradients(m, *given):
    m.zero_grad()
    loss = m.sum_nats(*given)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in m.parameters() if p.grad is not None)]


@pytest.mark.parametrize("preset", ["gated_delta", "titans_mac", "mesa", "titans_mlp", "softmax"])
def test_recomputed_blocks_change_no_bit(preset):
    m, given, calls = model(preset), batch(), []
    before = gradients(m, *given)
    for block in m.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for setting, count in (("all", 6), (1, 4), ("none", 3)):
        Recompute(m, setting)
        calls.clear()
        after = gradients(m, *given)
        assert len(calls) == count, setting
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), setting


def test_saved_tensors_are_asked_for_once():
    """A recomputed block gives them no second time (torch's CheckpointError). Kernels of a GPU are among those that
    ask, so the source is read."""
    functions = [
        (path.relative_to(ROOT), found)
        for path in (ROOT / "models").rglob("*.py")
        for found in ast.walk(ast.parse(path.read_text()))
        if isinstance(found, ast.FunctionDef | ast.Lambda)
    ]
    asked = [
        (str(path), function.lineno, sum(getattr(x, "attr", "") == "saved_tensors" for x in ast.walk(function)))
        for path, function in functions
    ]
    assert sum(times for *_, times in asked) > 15 and [each for each in asked if each[-1] > 1] == []


class Saved:
    """A GPU's counters, of the bytes that autograd saves; a recomputed block saves in another way."""

    def __init__(self):
        self.bytes = 0

    def pack(self, x):
        self.bytes += x.numel() * x.element_size()
        return x

    def memory_allocated(self):
        return self.bytes

    max_memory_allocated = memory_allocated

    def reset_peak_memory_stats(self):
        self.bytes = 0


def test_what_each_kind_of_block_saves_is_measured():
    """titans_mlp's blocks hold much more than those of softmax, and the last of each kind tells it."""
    layers = ["mixer@model.mixers.attention=softmax", "+mixer@model.mixers.deep=titans_mlp"]
    m = model("hybrid", *layers, "model.num_layers=4", "model.pattern=[attention,attention,deep,deep]")
    recompute, counters = Recompute(m, "auto"), Saved()
    with torch.autograd.graph.saved_tensors_hooks(counters.pack, lambda x: x):
        saved, peak, plain = measure(recompute, m.config.layers, lambda: m.sum_nats(*batch()), counters)
    assert plain == {1, 3} and recompute.saved[0] == recompute.saved[2] < saved[0]  # their inputs
    assert saved[0] == saved[1] > 0 and saved[2] == saved[3] > 2 * saved[0] and peak >= saved[1] + saved[3]


@pytest.mark.parametrize(
    "available, chosen, needs",
    [(200, [], 150), (150, [], 150), (149, [0], 130), (125, [0, 1], 110), (100, [0, 1, 2], 80), (10, [0, 1, 2], 80)],
)
def test_as_few_as_fit(available, chosen, needs):
    found = plan([20, 20, 30, 25], peak=70, plain={3}, more=10, available=available)
    assert found == (chosen, needs, 150, available)


def test_it_is_said():
    said = plan([GIB] * 4, peak=2 * GIB, plain={3}, more=0, available=3 * GIB).said(4)
    assert said == (
        "memory    2 of 4 blocks are recomputed in the backward pass (recompute=auto): "
        "a step needs 3.0 GiB so, 5.0 without, and there are 3.0"
    )
    assert (
        plan([1], 5 * GIB, {0}, 0, 6 * GIB).said(1) == "memory    5.0 of 6.0 GiB, as measured: no block is recomputed"
    )


def test_on_a_cpu_all_fits():
    m = model("softmax")
    loss, cpu = m.sum_nats, torch.device("cpu")
    assert Recompute(m, "auto").begin(loss, None, cpu) == Recompute(m, "none").begin(loss, None, cpu) == ""
    assert "2 of 3 blocks are recomputed" in Recompute(m, 2).begin(loss, None, cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", ["gated_delta", "titans_mac"])
def test_a_step_needs_what_was_said(preset, monkeypatch):
    """On a card where half of the blocks' memory is missing."""
    m = model(preset, "model.hidden_size=512", "model.num_heads=4", "model.num_layers=8").to("cuda")
    optimizer = torch.optim.AdamW(m.parameters(), fused=True)
    given, recompute = batch(2048, "cuda"), Recompute(m, "auto")

    def loss():
        with torch.autocast("cuda", torch.bfloat16):
            return m.sum_nats(*given)

    whole = choose(recompute, loss, optimizer, 0)
    assert not whole.chosen
    saved, peak, plain = measure(recompute, m.config.layers, loss)
    half = plan(saved, peak, plain, 0, (whole.needs + peak) // 2)
    recompute.chosen = set(half.chosen)
    for _ in range(2):
        optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        loss().backward()
        optimizer.step()
    assert 0 < len(half.chosen) < 7
    assert 0.5 * half.needs < torch.cuda.max_memory_allocated() < 1.1 * (half.needs + 3 * 4 * m.num_parameters())
