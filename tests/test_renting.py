"""The sheet for renting, and its formulas beside what a dry run counts. Bytes: tests/training/test_parallel.py."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from data.batch import batch_arithmetic
from models.language_model import LanguageModelConfig
from models.training.speed import PEAK_FLOPS
from scripts import renting
from scripts.planning import dry_run
from scripts.planning.dry_run import SHARE, span
from scripts.planning.memory import Planned
from scripts.planning.scaling import INFINIBAND, INSIDE, Parameters, Placing, bandwidth, hire, memory, more_tokens
from tests.conftest import ROOT
from tests.test_config import composed

N = Parameters(1000, 200, 600)


@pytest.mark.slow
def test_memory_is_what_a_dry_run_tells():
    config = OmegaConf.to_container(composed("size=340m"), resolve=True)
    planned = Planned(LanguageModelConfig(vocab_size=renting.VOCABULARY, **config["model"]), "bf16-mixed")
    n, batch = renting.parameters(planned), batch_arithmetic(2048, 128, 1, 8, 2048)
    assert n.root == planned.model.embedding.weight.numel() + config["model"]["hidden_size"]
    assert n.all == n.root + config["model"]["num_layers"] * n.block
    for place in (Placing("ddp", 8), Placing("fsdp", 8), Placing("hsdp", 8, 4)):
        told = planned.memory(config["optimizer"], batch, place.shards)
        gathered = 8 * n.block if place.shards > 1 else 0
        counted = told.weights + told.gradients + told.optimizer
        assert memory(n, place) == pytest.approx(counted + gathered, rel=1e-4)
        for whole_for in ("pass", "step") if place.shards > 1 else ():
            more = dry_run.gathered(told, place.shards, whole_for)
            counted = more.weights + more.gradients + more.optimizer
            assert memory(n, place._replace(whole_for=whole_for)) == pytest.approx(counted, rel=1e-4)


def test_time_is_what_a_dry_run_tells():
    batch = batch_arithmetic(1024, 128, 8, 1, 10**9)
    found = hire(N, Placing("ddp", 1), batch, 6 * 10**9, "A100", SHARE, price=2.0)
    total = 6e9 * batch.num_steps * batch.tokens
    assert span(found.hours * 3600) == span(total / (SHARE * PEAK_FLOPS["A100"]))
    assert found.sending == 0 and found.cost == 2 * found.hours


def test_bandwidth_of_a_ring():
    nvlink, express = INSIDE["H100"], INSIDE["RTX 4090"]
    assert bandwidth(8, 1, nvlink) == bandwidth(8, 4, nvlink) == nvlink
    assert bandwidth(64, 1, nvlink) == 8 * INFINIBAND  # eight rings, each by another card
    assert bandwidth(64, 8, nvlink) == INFINIBAND and bandwidth(64, 4, nvlink) == 2 * INFINIBAND
    assert bandwidth(64, 1, express) == bandwidth(64, 8, express) == express
    assert INSIDE.keys() == PEAK_FLOPS.keys()
    assert more_tokens(2**20, 2**20) == 2


@pytest.mark.slow
def test_the_page_has_what_the_script_prints(monkeypatch, capsys):
    page = (ROOT / "docs" / "scaling.md").read_text()
    (command,) = [
        line.split("renting.py ")[1] for line in page.splitlines() if line.startswith("    python scripts/re")
    ]
    monkeypatch.setattr("sys.argv", ["renting.py", *command.split()])
    renting.main()
    printed = capsys.readouterr().out.strip()
    assert f"```text\n{printed}\n```" in page
