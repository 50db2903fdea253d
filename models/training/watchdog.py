"""Notices that nothing happens any more."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from models.training.preemption import UNFINISHED


class Watchdog(Callback):
    """Ends a process that has made no progress for `timeout` seconds (None: never), so that whoever started it can
    start it again: exit code 75, as for a run that was asked to stop.

    First it says on stderr which rank this is, what it was doing and where in the code, and what the others were. A
    step waits for all ranks: where one hangs the others do, in the step, and the culprit is the one that hangs
    elsewhere or is not heard of any more. So every rank leaves word of itself in the run's directory, .ranks/RANK.
    The last of the callbacks, so that what the others do counts as what they do it after.
    """

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and timeout <= 0:
            raise ValueError(f"guard.timeout={timeout} is in seconds and must be positive, or null for none")
        self.timeout = timeout
        self.doing, self.beats = "", 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def now(self, doing: str) -> None:
        self.doing, self.beats = doing, self.beats + 1

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        self.words = Path(trainer.default_root_dir) / ".ranks"
        self.children: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        self.now("starting")
        if self.timeout is not None and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        # Idle time is the sum of the pauses of this thread, not a difference of clocks: a process that was suspended
        # has not been idle.
        pause, idle, seen = self._pause, 0.0, self.beats
        self._leave_word(idle)
        while not self._stop.wait(pause):
            idle, seen = (idle + pause if self.beats == seen else 0.0), self.beats
            self._leave_word(idle)
            if self.timeout is not None and idle >= self.timeout:
                self._end(idle)

    @property
    def _pause(self) -> float:
        return 5.0 if self.timeout is None else min(self.timeout / 10, 5.0)

    def _end(self, idle: float) -> None:
        stream = sys.__stderr__ or sys.stderr
        print(
            f"\nrank {self.rank} of {self.world_size} has made no progress for {idle:.0f} s "
            f"(guard.timeout={self.timeout:g}). It was {self.doing}. {self._others()}"
            "It ends here; the same command goes on.",
            file=stream,
            flush=True,
        )
        faulthandler.dump_traceback(stream)
        # Lightning's observer of the same list kills this process when it sees that one of them has ended
        children = self.children.copy()
        self.children.clear()
        for child in children:  # ranks that this one started: they end themselves too, if they still can
            try:
                child.wait(2 * self._pause)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        os._exit(UNFINISHED)

    def _leave_word(self, idle: float) -> None:
        if self.world_size == 1:
            return
        draft = self.words / f".{self.rank}"
        try:
            self.words.mkdir(exist_ok=True)
            draft.write_text(f"{idle:.0f} {self.doing}")
            draft.replace(self.words / str(self.rank))
        except OSError:
            pass  # a full disk is no reason to end a run, and the others will say that they have heard nothing

    def _others(self) -> str:
        """What the other ranks last said, a sentence each. Ages are differences of one file system's times: clocks of
        several machines need not agree."""
        return "".join(f"{self._word(rank)}. " for rank in range(self.world_size) if rank != self.rank)

    def _word(self, rank: int) -> str:
        path, own = self.words / str(rank), self.words / str(self.rank)
        try:  # whatever is wrong with the directory, this process must come to its end
            silent, (idle, doing) = own.stat().st_mtime - path.stat().st_mtime, path.read_text().split(" ", 1)
        except FileNotFoundError:
            return f"Rank {rank} has never been heard of"
        except (OSError, ValueError) as error:
            return f"What rank {rank} was doing can't be read: {error}"
        if silent > 3 * self._pause:
            return f"Rank {rank} has not been heard of for {silent:.0f} s, it is suspended or gone; it was {doing}"
        return f"Rank {rank} has made no progress for {idle} s; it was {doing}"

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._wait_for_batch(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.now(f"computing step {trainer.global_step + 1:,}")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._wait_for_batch(trainer)

    def _wait_for_batch(self, trainer: L.Trainer) -> None:
        self.now(f"waiting for its data loader, for step {trainer.global_step + 1:,}")

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.now(f"writing the checkpoint of step {trainer.global_step:,}")

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.now(f"waiting for its data loader, for the validation after step {trainer.global_step:,}")

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.now(f"validating after step {trainer.global_step:,}")

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.on_validation_start(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._wait_for_batch(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.now("finishing")

    def stop(self) -> None:
        self._stop.set()

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        self.stop()
