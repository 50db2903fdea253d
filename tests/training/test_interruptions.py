"""What may happen to a run, one accident at a time. scripts/faults.py has them all at once, at random moments."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import Dataset

from data.batch import batch_arithmetic
from data.module import DataModule
from data.synthetic import AssociativeRecall
from models.training import checkpoint as files
from models.training.checkpoint import Checkpoint, WholeFiles, newest_whole
from models.training.guards import Guard
from models.training.logger import CsvLogger, Tolerant, read_metrics
from models.training.module import Training
from models.training.optimizer import adamw
from models.training.preemption import UNFINISHED, Preemption, Stopped
from models.training.run import Run, RunError
from models.training.schedule import warmup_stable_decay
from models.training.watchdog import Watchdog
from tests.conftest import ROOT
from tests.test_language_model import model
from tests.training.test_run import rows, start

NUM_STEPS = 12


class Fit:
    """A run of twelve steps in this process; `at` is called with the number of every step before it is computed."""

    def __init__(self, folder: Path, at=lambda step: None, loggers=(), task=None, every=3, seed=0, **guard):
        self.folder, self.preemption = folder, Preemption()
        L.seed_everything(seed, verbose=False)
        task = task or AssociativeRecall(seq_len=16, num_pairs=2, vocab_size=23, validation_size=4)
        batch = batch_arithmetic(64, 16, 2, 1, 64 * NUM_STEPS)
        self.guard = Guard(**guard)
        self.module = Training(
            model("gated_delta").float(),
            lambda m: adamw(m, lr=1e-2),
            warmup_stable_decay,
            num_steps=NUM_STEPS,
            clip_norm=1.0,
            targets_per_token=task.targets_per_token,
            guard=self.guard,
            preemption=self.preemption,
        )
        self.data = DataModule(task, batch, validation_tokens=64, seed=0)
        self.log = Tolerant(CsvLogger(str(folder)))
        self.checkpoints = Checkpoint(folder / "checkpoints", every, 6, self.preemption)
        self.watchdog = Watchdog(None)
        self.callbacks = [At(at), self.preemption, self.checkpoints, self.watchdog]
        self.loggers = [self.log, *loggers]

    def run(self) -> Fit:
        self.trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=self.folder,
            logger=self.loggers,
            callbacks=self.callbacks,
            max_steps=NUM_STEPS,
            max_epochs=-1,
            accumulate_grad_batches=2,
            val_check_interval=12,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        path, self.torn = newest_whole(self.folder / "checkpoints")
        self.log.resume(files.step_of(path) if path else 0)
        with self.preemption:
            self.trainer.fit(self.module, self.data, ckpt_path=path)
        return self

    @property
    def rows(self) -> list[dict[str, float]]:
        return read_metrics(self.folder / CsvLogger.FILE)


class At(Callback):
    def __init__(self, at) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if index % 2 == 0:
            self.at(trainer.global_step + 1)


def fit(folder, *args, **settings) -> Fit:
    return Fit(folder, *args, **settings).run()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other over tensors as small as these
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_thread) -> Fit:
    return fit(tmp_path_factory.mktemp("undisturbed"))


def assert_same(ours: Fit, theirs: Fit) -> None:
    assert ours.rows == theirs.rows and [row["step"] for row in ours.rows] == list(range(NUM_STEPS))
    mine, other = (torch.load(newest_whole(f.folder / "checkpoints")[0], weights_only=True) for f in (ours, theirs))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "guard", "callbacks"):
        assert str(mine[part]) == str(other[part]), part
    assert all(
        torch.equal(a, b) for a, b in zip(mine["state_dict"].values(), other["state_dict"].values(), strict=True)
    )


# signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 6])  # 6 ends with a validation
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on(number, step, undisturbed, tmp_path):
    """In the middle of an accumulation window, and once more: the same code, and one checkpoint of that step."""

    def at(now):
        if now == step:
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)

    with pytest.raises(Stopped) as stopped:
        fit(tmp_path, at)
    assert stopped.value.code == (130 if number == signal.SIGINT else UNFINISHED)
    assert newest_whole(tmp_path / "checkpoints")[0].name == f"step-{step:09d}.ckpt"
    assert_same(fit(tmp_path), undisturbed)


def test_before_training_a_signal_ends_the_run_at_once_and_ctrl_c_twice_does_later(tmp_path):
    with pytest.raises(Stopped, match="by SIGTERM before the first step; the same command goes on"), Preemption():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        preemption.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.votes() == [1.0, 0.0]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_workers_outlive_a_signal_to_the_group():
    with Preemption():
        pid = os.fork()
        if not pid:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


@pytest.mark.parametrize("number, array, jobs", [
    (signal.SIGUSR1, {}, "requeue 17\n"),
    (signal.SIGUSR2, {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}, "requeue 17_3\n"),
    (signal.SIGTERM, {}, ""),
])  # fmt: skip
def test_slurm_gets_its_job_back_ahead_of_a_time_limit(number, array, jobs, tmp_path, monkeypatch):
    """By SIGUSR2 where submitit submitted it (https://github.com/facebookincubator/submitit/issues/1709); and of an
    array this task alone (https://github.com/Lightning-AI/pytorch-lightning/issues/15022)."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/jobs\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in ({"SLURM_JOB_ID": "17"} | array).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "jobs").touch()
    with pytest.raises(Stopped), Preemption():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert (tmp_path / "jobs").read_text() == jobs


# checkpoints


@pytest.mark.slow
def test_the_newest_whole_checkpoint_is_used(undisturbed, tmp_path):
    """Cut short, one bit changed, or without its checksum: it is named, and the run goes on from the one before."""

    def at(now):
        if now == 8:
            raise OSError("as if killed")

    for how in ("cut", "bit", "checksum"):
        folder = tmp_path / how
        with pytest.raises(OSError, match="as if killed"):
            fit(folder, at)
        last = folder / "checkpoints" / "step-000000006.ckpt"
        assert sorted(p.name for p in last.parent.glob("*.ckpt")) == ["step-000000003.ckpt", last.name]
        data = bytearray(last.read_bytes())
        if how == "cut":
            last.write_bytes(data[:-1])
        elif how == "bit":
            data[len(data) // 2] ^= 1
            last.write_bytes(data)
        else:
            Path(f"{last}.sha256").unlink()
        again = fit(folder)
        assert len(again.torn) == 1 and again.torn[0].startswith(f"{last} is torn: ")
        assert_same(again, undisturbed)


def test_no_whole_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path):
    for step in (3, 6):
        WholeFiles().save_checkpoint({"x": torch.ones(3)}, tmp_path / f"step-{step:09d}.ckpt")
    assert newest_whole(tmp_path) == (tmp_path / "step-000000006.ckpt", [])
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"(?s)000006.ckpt is torn.*000003.ckpt is torn.*No checkpoint is whole"):
        newest_whole(tmp_path)
    assert newest_whole(tmp_path / "nowhere") == (None, [])


def test_checkpoints_load_with_weights_only(undisturbed):
    path, _ = newest_whole(undisturbed.folder / "checkpoints")
    found = torch.load(path, weights_only=True)
    assert {"state_dict", "optimizer_states", "guard"} <= found.keys()
    assert found["callbacks"]["Checkpoint"]["random"][0].keys() == {"python", "numpy", "torch"}


def test_random_numbers_go_on_where_they_were(tmp_path):
    """Python's, NumPy's and torch's, drawn in every step of a run that is stopped and of one that is not."""
    import random

    import numpy as np

    def drawing(into, stop=None):
        def at(now):
            into.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            if now == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        return at

    whole, parts = [], []
    fit(tmp_path / "a", drawing(whole), seed=5)
    with pytest.raises(Stopped):
        fit(tmp_path / "b", drawing(parts, stop=5), seed=5)
    fit(tmp_path / "b", drawing(parts), seed=6)
    assert parts == whole and len(set(whole)) == NUM_STEPS


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_to_the_next_try(undisturbed, tmp_path, capsys, monkeypatch):
    """The third checkpoint fails; then all from there on, and the end is an error, with the last whole one kept."""
    sync = files.sync

    def full(when):
        def failing(file):
            if when(int(re.search(r"step-(\d+)", file.name)[1])):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(file)

        monkeypatch.setattr(files, "sync", failing)

    full(lambda step: step == 9)
    once = fit(tmp_path / "once")
    said = capsys.readouterr().out
    assert "the checkpoint of step 9 could not be written" in said and "No space left on device" in said
    assert_same(once, undisturbed)
    full(lambda step: step >= 9)
    with pytest.raises(RunError, match=r"step 12 could not be written.*goes on from step 6"):
        fit(tmp_path / "always")
    assert newest_whole(tmp_path / "always" / "checkpoints")[0].name == "step-000000006.ckpt"
    assert not list(tmp_path.glob("**/*.partial"))
    monkeypatch.setattr(files, "sync", sync)
    assert_same(fit(tmp_path / "always"), undisturbed)


def test_a_write_that_fails_inside_torch_is_told_as_what_it_is(tmp_path):
    """The system's own error, from a limit on the size of files."""
    io, limits = WholeFiles(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        io.save_checkpoint({"x": torch.ones(100_000)}, tmp_path / "step-000000001.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert io.error == os.strerror(errno.EFBIG) and not list(tmp_path.iterdir())


# numbers that are not


def spoilt(steps):
    """A Fit whose loss is NaN in these steps."""

    def make(folder, **settings):
        run = Fit(folder, **settings)
        step = run.module.training_step

        def training_step(batch, batch_idx):
            loss = step(batch, batch_idx)
            return loss * float("nan") if run.trainer.global_step + 1 in steps else loss

        run.module.training_step = training_step
        return run

    return make


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path, capsys):
    weights = {}
    run = spoilt({4, 5})(tmp_path, max_skipped=2)
    run.callbacks[0].at = lambda step: weights.__setitem__(
        step,
        [p.detach().clone() for p in run.module.parameters()]
        + [v.clone() for s in run.module.optimizers().state.values() for v in s.values()],
    )
    run.run()
    same = {s: all(map(torch.equal, weights[s], weights[s + 1])) for s in range(2, NUM_STEPS)}
    assert [s for s in same if same[s]] == [4, 5]
    assert [row["train/skipped_steps"] for row in run.rows] == [0] * 3 + [1] + [2] * 8
    assert "The step is left out, 2 in a row of at most 2" in capsys.readouterr().out


def test_too_many_in_a_row_end_the_run_and_name_the_tensors(tmp_path):
    with pytest.raises(RunError, match=r"step 6:.*the gradient of embedding\.weight.*3 in a row.*max_skipped=2"):
        spoilt({4, 5, 6})(tmp_path, max_skipped=2).run()
    with pytest.raises(RunError, match=r"3 in a row"):  # the count goes on with the run: 4 and 5 are computed again
        spoilt({4, 5, 6})(tmp_path, max_skipped=2).run()
    with pytest.raises(ValueError, match=r"guard\.max_skipped=-1"):
        Guard(max_skipped=-1)


def test_a_spike_is_told(capsys):
    guard = Guard(spike_score=6)
    parameters = [("w", torch.ones(2))]
    for step in range(1, 200):
        guard.accepts(step, 3 + 0.1 * (-1) ** step, 1.0, parameters)
    assert not capsys.readouterr().out and abs(guard.metrics()["train/spike_score"]) < 1.1
    assert guard.accepts(200, 4.0, 1.0, parameters)
    assert "step 200: the loss is 4, 10.0 standard deviations above the 3 of" in capsys.readouterr().out
    again = Guard(spike_score=6)
    again.load_state_dict(guard.state_dict())
    assert again.accepts(201, 3.1, 1.0, parameters) == guard.accepts(201, 3.1, 1.0, parameters)
    assert again.score == guard.score
    learned = Guard(spike_score=6)  # of a task that is learned: a hard batch is no spike
    for step in range(1, 200):
        learned.accepts(step, 1e-3, 1.0, parameters)
    capsys.readouterr()
    assert learned.accepts(200, 0.03, 1.0, parameters) and not capsys.readouterr().out


# hanging, loggers, the lock


class Sleepy(AssociativeRecall):
    def train_samples(self):
        samples = super().train_samples()

        class Asleep(Dataset):
            read = 0

            def __len__(self):
                return len(samples)

            def __getitem__(self, index):
                Asleep.read += 1
                time.sleep(2.0 * (Asleep.read == 9))
                return samples[index]

        return Asleep()


def test_the_watchdog_names_who_hangs_and_where(tmp_path, monkeypatch, capfd):
    codes = []
    run = Fit(tmp_path, task=Sleepy(seq_len=16, num_pairs=2, vocab_size=23, validation_size=4))
    run.watchdog.timeout = 0.6
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), run.watchdog.stop()))
    run.run()
    said = capfd.readouterr().err
    assert codes == [UNFINISHED]
    assert re.search(r"rank 0 of 1 has made no progress for 0\.\d|1 s", said) and "guard.timeout=0.6" in said
    assert "It was waiting for its data loader, for step 3." in said
    assert "in __getitem__" in said
    with pytest.raises(ValueError, match=r"guard\.timeout=0"):
        Watchdog(0)


def test_what_is_left_of_other_ranks_words_does_not_stop_the_watchdog(tmp_path):
    watchdog = Watchdog(10)
    watchdog.rank, watchdog.world_size, watchdog.words = 0, 4, tmp_path / ".ranks"
    assert watchdog._word(1) == "Rank 1 has never been heard of"
    watchdog.now("computing step 3")
    watchdog._leave_word(12.0)
    (watchdog.words / "1").write_text("7 waiting for its data loader")
    (watchdog.words / "2").write_text("")
    os.utime(watchdog.words / "1")
    said = watchdog._others()
    assert "Rank 1 has made no progress for 7 s; it was waiting for its data loader. " in said
    assert "What rank 2 was doing can't be read: " in said and "Rank 3 has never been heard of. " in said


class Broken(Logger):
    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, 0

    def _perhaps(self, what):
        self.calls += 1
        if what == self.where:
            raise ConnectionError("the network is down")

    name = property(lambda self: "broken")
    version = property(lambda self: "")
    experiment = property(lambda self: self._perhaps("experiment"))

    def log_hyperparams(self, *args):
        self._perhaps("log_hyperparams")

    def log_metrics(self, metrics, step=None):
        self._perhaps("log_metrics")


@pytest.mark.parametrize("where", ["experiment", "log_metrics"])
def test_a_logger_that_fails_is_left_alone(where, undisturbed, tmp_path, capsys):
    run = fit(tmp_path, loggers=[Tolerant(Broken(where))])
    said = capsys.readouterr().out
    assert said.count("warning: Broken failed and is left out") == 1 and "the network is down" in said
    assert run.rows == undisturbed.rows


def test_metrics_that_could_not_be_written_come_later(tmp_path, monkeypatch, capsys):
    log = CsvLogger(str(tmp_path))
    log.resume(0)
    log.log_metrics({"a": 1.0}, 0)
    with monkeypatch.context() as patch:
        patch.setattr(log, "_append", lambda row: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        patch.setattr(log, "_rewrite", lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        log.log_metrics({"a": 2.0}, 1)
        log.log_metrics({"a": 3.0}, 2)
    assert capsys.readouterr().out.count("No space left") == 1
    log.log_metrics({"a": 4.0}, 3)
    assert [row["a"] for row in read_metrics(tmp_path / CsvLogger.FILE)] == [1, 2, 3, 4]


def test_rows_keep_their_text(tmp_path):
    log = CsvLogger(str(tmp_path))
    log.resume(0)
    for step in range(20):
        log.log_metrics({"train/loss": 1 / (step + 3)} | ({"validation/nats": 0.1} if step % 5 == 4 else {}), step)
    text = (tmp_path / CsvLogger.FILE).read_text()
    (tmp_path / CsvLogger.FILE).write_text(text[:-9])  # cut off by a kill
    again = CsvLogger(str(tmp_path))
    again.resume(15)
    lines = (tmp_path / CsvLogger.FILE).read_text().splitlines()
    assert lines == text.splitlines()[:16]


def test_a_directory_has_one_run_at_a_time(tmp_path):
    """The lock dies with its process, though a child of it lives on."""
    config = {"name": "run", "overwrite": False}
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        run = Run(tmp_path / "run", config)
        run.enter()
        worker = os.fork()
        if worker:
            os.write(writer, str(worker).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(ValueError, match=rf"another process is training in {tmp_path}/run"):
            Run(tmp_path / "run", config).enter()
        with pytest.raises(ValueError, match=r"another process is training"):
            Run(tmp_path / "run", config | {"overwrite": True}).enter()
        Run(tmp_path / "run", config).enter(main_process=False)  # another rank
        other = config | {"overwrite": True, "seed": 7}  # the first rank may not have deleted what is there yet
        Run(tmp_path / "run", other).enter(main_process=False)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    try:
        Run(tmp_path / "run", config).enter()
    finally:
        os.kill(worker, signal.SIGKILL)


# whole processes


@pytest.mark.slow
def test_one_to_two_to_four_processes_and_back(tmp_path, cache):
    """Stopped by a signal to the first process alone, every few steps; the batches stay the same, so that the losses
    are those of one process to rounding."""
    slow = ("optimizer.lr=1e-4", "micro_batch=1", "tokens=20480", "validate_every=40")  # what rounding is amplified by
    said = start(tmp_path / "one", cache, *slow).end()
    assert "finished" in said, said
    metrics = tmp_path / "more" / "run" / CsvLogger.FILE
    starts = []
    for world_size in (1, 2, 4, 1):
        split = ("strategy=ddp", f"trainer.devices={world_size}", "trainer.accelerator=cpu") if world_size > 1 else ()
        process = start(tmp_path / "more", cache, *slow, *split)
        done = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
        starts.append(done)
        while len(starts) < 4 and process.returncode is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) > done + 2:
                process.send_signal(signal.SIGUSR1)
                break
            time.sleep(0.005)
        said = process.end()
        assert process.returncode == (UNFINISHED if len(starts) < 4 else 0), said
    ours, theirs = rows(tmp_path / "more" / "run"), rows(tmp_path / "one" / "run")
    assert [row["step"] for row in ours] == list(range(40))
    for first in starts:
        for a, b in list(zip(ours, theirs, strict=True))[first : first + 3]:
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
            assert a["train/gradient_norm"] == pytest.approx(b["train/gradient_norm"], rel=1e-3)


@pytest.mark.slow
def test_a_few_kills():
    """The script that kills runs at random moments, for a short while."""
    import subprocess

    command = [sys.executable, "scripts/faults.py", "--kills", "4", "--seed", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "4 kills in" in done.stdout, done.stdout + done.stderr
