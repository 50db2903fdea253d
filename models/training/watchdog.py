"""Notices that nothing happens any more."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from models.training.preemption import UNFINISHED


class Watchdog(Callback):
    """Ends a process that has made no progress for `timeout` seconds (None: never), so that whoever started it can
    start it again: exit code 75, as for a run that was asked to stop.

    First it says on stderr which rank this is, what it was doing and where in the code. A step waits for all ranks:
    where one hangs the others do, in the step, and the one that hangs elsewhere or began to hang first is the culprit.
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
        self.now("starting")
        if self.timeout is not None and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        # Idle time is the sum of the pauses of this thread, not a difference of clocks: a process that was suspended
        # has not been idle.
        pause, idle, seen = min(self.timeout / 10, 5.0), 0.0, self.beats
        while not self._stop.wait(pause):
            idle, seen = (idle + pause if self.beats == seen else 0.0), self.beats
            if idle >= self.timeout:
                self._end(idle)

    def _end(self, idle: float) -> None:
        stream = sys.__stderr__
        print(
            f"\nrank {self.rank} of {self.world_size} has made no progress for {idle:.0f} s "
            f"(guard.timeout={self.timeout:g}). It was {self.doing}. It ends here; the same command goes on.",
            file=stream,
            flush=True,
        )
        faulthandler.dump_traceback(stream)
        os._exit(UNFINISHED)

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
