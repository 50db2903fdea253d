"""A run is the same under every strategy: losses, and what goes on from a checkpoint under another one."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist

from data.batch import batch_arithmetic
from data.module import DataModule
from data.synthetic import AssociativeRecall
from models.training import background
from models.training.checkpoint import WholeFiles, read, remove, what_is_wrong
from models.training.module import Training
from models.training.optimizer import adamw, muon
from models.training.parallel import DDP, PIECE, Sharded, pieces
from models.training.schedule import warmup_stable_decay
from models.training.shards import shards_of
from scripts.planning.scaling import Parameters, Placing, sent
from tests.test_language_model import model

EACH = 2  # steps under each strategy, one after the other
SEQUENCES = 8
STRATEGIES = {
    2: {"ddp": lambda: DDP(), "fsdp": lambda: Sharded(), "ddp, at the end": lambda: AtTheEnd()},
    4: {
        "fsdp, step": lambda: Sharded(whole_for="step"),
        "hsdp": lambda: Sharded(replicas=2),
        "fsdp, shards": lambda: Sharded(checkpoint="sharded"),
        "ddp": lambda: DDP(),
        "hsdp, shards": lambda: Sharded(replicas=2, whole_for="step", checkpoint="sharded"),
    },
}
HALF = {"ddp, bfloat16": lambda: DDP(reduction="bfloat16"), "fsdp, bfloat16": lambda: Sharded(reduction="bfloat16")}
MUON = {"ddp, muon": lambda: DDP(), "fsdp, muon": lambda: Sharded()}  # whose matrices the processes share
STEPS = EACH * (2 + max(map(len, STRATEGIES.values())))


class AtTheEnd(DDP):
    """As where micro-batches are CUDA graphs."""

    def configure_ddp(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("models.training.parallel.refusal", lambda *_: None)
            super().configure_ddp()
        assert self.at_the_end


class Counting:
    """Bytes that a device of a ring sends for what is gathered, divided and added up, while it is on. What is smaller
    than a block's gradients is none of these."""

    def __init__(self) -> None:
        self.sent = 0.0

    def __enter__(self) -> Counting:
        self.patch = pytest.MonkeyPatch()
        names = ["all_gather_single", "reduce_scatter_single"]
        if not hasattr(dist, names[0]):  # torch before 2.13
            names = ["all_gather_into_tensor", "reduce_scatter_tensor"]
        for name in (*names, "all_reduce"):
            self.patch.setattr(dist, name, partial(self.count, getattr(dist, name), name))
        return self

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()

    def count(self, function: Any, name: str, *tensors: Any, group: Any = None, **others: Any) -> Any:
        given = [*tensors, *(x for x in others.values() if isinstance(x, torch.Tensor))]
        size, world = max(x.numel() * x.element_size() for x in given), dist.get_world_size(group)
        if size > 4000:
            self.sent += (2 if name == "all_reduce" else 1) * (world - 1) / world * size
        return function(*tensors, group=group, **others)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.found.append(module.loss)


def fit(
    folder: Path, strategy: Any, world: int, until: int, begin: Path | None = None, optimizer: Any = adamw
) -> list[float]:
    """The losses of the steps that were computed; a checkpoint is left in the folder. Two micro-batches a step."""
    L.seed_everything(0, verbose=False)
    task = AssociativeRecall(seq_len=16, num_pairs=2, vocab_size=23, validation_size=4)
    batch = batch_arithmetic(16 * SEQUENCES, 16, SEQUENCES // world // 2, world, 16 * SEQUENCES * STEPS)
    settings: dict[str, Any] = {"num_steps": STEPS, "clip_norm": 1.0, "targets_per_token": task.targets_per_token}
    m = model("gated_delta", num_layers=2).float()
    module = Training(m, lambda m: optimizer(m, lr=1e-2), warmup_stable_decay, **settings)
    module.cuda_graph = isinstance(strategy, AtTheEnd)
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_steps=until,
        max_epochs=-1,
        accumulate_grad_batches=batch.accumulation,
        limit_val_batches=0,
        logger=False,
        callbacks=[losses],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataModule(task, batch, validation_tokens=64, seed=0)
    if begin:
        trainer.strategy.checkpoint_io = WholeFiles()
    trainer.fit(module, data, ckpt_path=begin and begin / "saved.ckpt", weights_only=True)
    trainer.strategy.checkpoint_io = getattr(trainer.strategy, "files", None) or WholeFiles()
    trainer.save_checkpoint(folder / "saved.ckpt")
    change(module, trainer.optimizers[0])
    assert not trainer.strategy.checkpoint_io.finish()
    return losses.found


@torch.no_grad()
def change(module: Training, optimizer: torch.optim.Optimizer) -> None:
    """What the next step would, while a checkpoint may still be written."""
    for x in (*module.parameters(), *(x for state in optimizer.state.values() for x in state.values())):
        x.add_(1)
    optimizer.param_groups[0]["lr"] = -1.0


def process(rank: int, world: int, folder: Path, port: int) -> None:
    """One strategy after the other, from the checkpoint of one device; and from there with half the precision."""
    try:
        torch.set_num_threads(1)
        write = background.ShardedFiles._write
        background.ShardedFiles._write = lambda *arguments: (time.sleep(0.1), write(*arguments))[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
        each = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
        os.environ |= {name: str(x) for name, x in (common | each).items()}
        found, begin, until = {}, folder / "first", EACH
        for name, make in STRATEGIES[world].items():
            until += EACH
            with Counting() as counting:
                found[name] = fit(folder / name, make(), world, until, begin)
            found[f"{name}, sent"], begin = counting.sent, folder / name
        for name, make in HALF.items() if world == 2 else ():
            found[name] = fit(folder / "half", make(), world, 2 * EACH, folder / "first")
        for name, make in MUON.items() if world == 2 else ():
            found[name] = fit(folder / "muon", make(), world, EACH, optimizer=muon)
        if rank == 0:
            torch.save(found, folder / "found.pt")
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_strategy_is_the_same_run(world, tmp_path):
    """One device begins, each strategy takes over from the one before, and one device ends: as if it had been alone.

    How an optimizer's state names parameters: https://github.com/pytorch/pytorch/issues/113673
    """
    expected = fit(tmp_path / "alone", "auto", 1, STEPS)
    assert fit(tmp_path / "first", "auto", 1, EACH) == expected[:EACH]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=(rank, world, tmp_path, port)) for rank in range(world)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
    errors = [path.read_text() for path in sorted(tmp_path.glob("error-*"))]
    assert [each.exitcode for each in processes] == [0] * world, errors[0] if errors else "not done in time"
    found = torch.load(tmp_path / "found.pt")
    for i, name in enumerate(STRATEGIES[world], 1):
        assert found[name] == pytest.approx(expected[EACH * i : EACH * (i + 1)], rel=1e-5), name
        if name not in ("ddp", "ddp, bfloat16"):  # in which torch sends by itself
            assert found[f"{name}, sent"] == pytest.approx(EACH * by_formula(name, world), rel=0.03), name
    rest = expected[EACH * (i + 1) :]
    assert fit(tmp_path / "last", "auto", 1, STEPS, tmp_path / name) == pytest.approx(rest, rel=1e-5)
    if world == 4:
        whole_or_not(tmp_path / name / "saved.ckpt")
    for name in HALF if world == 2 else ():
        assert found[name] != expected[EACH : 2 * EACH]
        assert found[name] == pytest.approx(expected[EACH : 2 * EACH], rel=5e-3), name
    for name in MUON if world == 2 else ():
        assert found[name] == pytest.approx(fit(tmp_path / "muon", "auto", 1, EACH, optimizer=muon), rel=1e-5), name


def by_formula(name: str, world: int) -> float:
    """Bytes that a device sends in a step of two micro-batches, as docs/scaling.md has it."""
    m = model("gated_delta", num_layers=2)
    blocks = [sum(p.numel() for p in block.parameters()) for block in m.blocks]
    n = Parameters(m.num_parameters(), blocks[-1], m.num_parameters() - sum(blocks))
    strategy, _, rest = name.partition(", ")
    whole_for = "step" if rest in ("step", "shards") and name != "fsdp, shards" else "block"
    return sum(sent(n, Placing(strategy, world, 2 if strategy == "hsdp" else 1, whole_for), accumulation=2))


def whole_or_not(path: Path) -> None:
    """Of a checkpoint with shards every file counts; and torch would run what its .metadata names."""
    shards = sorted(shards_of(path).iterdir())
    assert [file.name for file in shards] == [".metadata", *(f"__{i}_0.distcp" for i in range(4))]
    assert not what_is_wrong(path)
    for file in shards:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert f"of saved.shards/{file.name} do not have the checksum" in what_is_wrong(path)
        file.unlink()
        assert f"{file.name} is missing" in what_is_wrong(path)
        file.write_bytes(content)
    shards[0].write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for posix.getcwd, which has no place in it"):
        read(path)
    remove(path.parent, lambda step: True)  # not of a step's name
    path.rename(path.with_name("step-000000007.ckpt"))
    shards_of(path).rename(path.with_name("step-000000007.shards"))
    remove(path.parent, lambda step: True)
    assert not list(path.parent.glob("step*"))


def test_gradients_in_pieces():
    tensors = [torch.empty(n, device="meta") for n in (3, PIECE, PIECE - 3, 3, 1)]
    assert [[len(x) for x in part] for part in pieces(tensors)] == [[3], [PIECE], [PIECE - 3, 3], [1]]


def test_a_wrong_setting_is_told():
    with pytest.raises(ValueError, match=r"trainer.strategy.reduction=half is not one of float32, bfloat16"):
        DDP(reduction="half")
    with pytest.raises(ValueError, match=r"trainer.strategy.whole_for=ever is not one of auto, block, pass, step"):
        Sharded(whole_for="ever")


def test_parameters_stay_whole_for_a_step_where_a_gpu_has_the_memory(monkeypatch):
    """1.27 billion parameters on two cards of 80 GB, and seven on eight. On a CPU: for a block."""
    strategy = Sharded(whole_for="auto")
    monkeypatch.setattr(type(strategy), "root_device", torch.device("cpu"))
    assert strategy._affordable(10) == "block"
    monkeypatch.setattr(type(strategy), "root_device", torch.device("cuda"))
    of_card = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: of_card)
    monkeypatch.setattr("models.training.parallel.torch.tensor", lambda x, device: torch.as_tensor(x))
    monkeypatch.setattr("models.training.parallel.dist.all_reduce", lambda *_: None)
    found = []
    for world, size in ((2, 1_270_000_000), (8, 7_000_000_000)):
        monkeypatch.setattr("models.training.parallel.dist.get_world_size", lambda world=world: world)
        found.append(strategy._affordable(size))
    assert found == ["step", "block"]
    assert strategy.held_between(10) == 0 and Sharded(whole_for="step").held_between(10) == 40
