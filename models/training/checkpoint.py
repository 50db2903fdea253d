"""The state of a run on disk: written so that a kill or a full disk can't spoil it, read only if it is whole.

checkpoints/step-000000020.ckpt         weights, optimizer, schedule, counters, random state; torch.load reads it
            step-000000020.ckpt.sha256  its checksum, as `sha256sum --check` reads it
            step-000000020.keep         an empty file: this one is never deleted
            step-000000020.shards/      where the strategy has it so: the tensors, a file a device (shards.py)

A checkpoint is written under another name, synced to the disk and renamed, its checksum before it; what has the name is
whole, but for a failing disk, and that the checksum finds. keep.py says which ones stay. It is the one file that the
first rank writes, unless the strategy has shards, which are written while training goes on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from models.training.preemption import Preemption, Stopped
from models.training.random_state import random_state, set_random_state
from models.training.run import RunError
from models.training.shards import SHARDED, read_whole


class Checkpoint(Callback):
    """Saves every `every` steps, at the end, and when the run is asked to stop, which it then does. It comes after the
    callbacks that log.

    A step is over when its row has been logged and its validation, where one is due, is done: a run that is killed
    while it validates then validates again when it goes on. (Lightning's ModelCheckpoint saves before either.) Where
    the file can't be written the run says so and goes on to the next try; at the end that is an error.

    newest, kept: how many of the last checkpoints stay, and steps at which it saves too, whose checkpoints stay
        (keep.py), under another `kept` too, for they are marked.
    plateau: a step at which it saves too, whose checkpoint stays as long as the schedule is this one (schedule.py:
        end_of_plateau).
    mirror: where each is copied to (mirror.py), or None.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int,
        validate_every: int,
        preemption: Preemption,
        newest: int = 2,  # the newest, and one to go back to
        kept: frozenset[int] = frozenset(),
        plateau: int | None = None,
        mirror: Any = None,
    ) -> None:
        self.folder, self.every, self.validate_every = Path(folder), every, validate_every
        self.preemption, self.newest, self.kept, self.plateau = preemption, newest, kept, plateau
        self.finished = self.saved = 0  # the last step that is over, and that is in a file
        self.begun: int | None = None  # the step of a checkpoint that is being written
        self.files, self.mirror = WholeFiles(), mirror

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.trainer = trainer
        self.files = getattr(trainer.strategy, "files", None) or self.files
        trainer.strategy.checkpoint_io = self.files

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.finished = self.saved = trainer.global_step
        if self._saved_random_states:  # here and not before, because to make a loader draws a number
            self._go_on_drawing(trainer, self._saved_random_states)
        if trainer.is_global_zero and self.folder.exists():
            remove(self.folder, lambda step: step > self.saved)  # torn, or they would have been resumed from
            for path in self.folder.glob("step-[0-9]*.ckpt"):  # of before `keep` named it, or a kill came between
                if step_of(path) in self.kept:
                    mark(path)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.finished:  # in the middle of an accumulation window
            return
        if trainer.enable_validation and trainer.global_step % self.validate_every == 0:
            self._before = random_state(trainer.strategy.root_device)  # validation, whose loader draws, leaves no trace
        else:
            trainer._logger_connector.update_train_step_metrics()  # Lightning logs the row after this hook
            self._end_of_step(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.global_step > self.finished:
            set_random_state(self._before, trainer.strategy.root_device)
            self._end_of_step(trainer)

    def _end_of_step(self, trainer: L.Trainer) -> None:
        self.finished = trainer.global_step
        if self.finished == trainer.max_steps:  # then comes on_train_end
            return
        if self.preemption.agreed or self.finished % self.every == 0 or self._stays(self.finished):
            self._save(trainer, wait=self.preemption.agreed)
        if self.preemption.agreed:
            if self.mirror and trainer.is_global_zero:
                self.mirror.wait()
            raise Stopped(self.preemption, f"after step {self.finished:,}; saved is step {self.saved:,}")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.interrupted:
            return
        self._settle(trainer)
        if trainer.global_step == self.saved:
            return
        if error := self._save(trainer, wait=True):
            raise RunError(f"{error}. Make room, and give the same command again: it goes on from step {self.saved:,}")

    def _save(self, trainer: L.Trainer, wait: bool) -> str:
        """Every rank takes part. wait: until it is written. Says what went wrong with it, where that is known."""
        self._settle(trainer)
        self.begun = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step-{self.begun:09d}.ckpt")
        return self._settle(trainer) if wait or not self.files.background else ""

    def _settle(self, trainer: L.Trainer) -> str:
        """Waits until what was begun is written. Says what went wrong, if anything did. Every rank takes part."""
        if self.begun is None:
            return ""
        step, self.begun = self.begun, None
        error = trainer.strategy.broadcast(self.files.finish())
        if error:
            error = f"the checkpoint of step {step:,} could not be written to {self.folder} ({error})"
            if trainer.is_global_zero:
                print(f"warning: {error}; the last one is of step {self.saved:,}", flush=True)
            return error
        self.saved = step
        if trainer.is_global_zero:
            if step in self.kept:
                mark(self.folder / f"step-{step:09d}.ckpt")
            newest = sorted(self.folder.glob("step-[0-9]*.ckpt"))[-self.newest :]
            marked = {step_of(path) for path in self.folder.glob("step-[0-9]*.keep")}
            if self.mirror:
                self.mirror.wait()  # for what is removed now may be on its way
            remove(self.folder, lambda step: step < step_of(newest[0]) and not self._stays(step) and step not in marked)
            if self.mirror:
                self.mirror.begin(step)
        return ""

    def _stays(self, step: int) -> bool:
        return step in self.kept or step == self.plateau

    # the random state of every rank; Lightning saves none

    _saved_random_states: list[dict[str, Any]] | None = None

    def _go_on_drawing(self, trainer: L.Trainer, states: list[dict[str, Any]]) -> None:
        """On another number of ranks or kind of device there is no state to go on from: the seed, the step and the rank
        make one."""
        device = trainer.strategy.root_device
        if len(states) == trainer.world_size and ("cuda" in states[0]) == (device.type == "cuda"):
            set_random_state(states[trainer.global_rank], device)
        else:
            seed = hash((torch.initial_seed(), trainer.global_step, trainer.global_rank)) % 2**32
            L.seed_everything(seed, verbose=False)

    def state_dict(self) -> dict[str, Any]:
        mine = random_state(self.trainer.strategy.root_device)
        everyone: list[Any] = [mine]
        if torch.distributed.is_initialized():
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, mine)
        return {"random": everyone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved_random_states = state["random"]


class WholeFiles(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, with the writing as the module's docstring has it.

    (Lightning's own puts the whole checkpoint together in memory first, and syncs nothing.) `error` is what went wrong
    with the last write, "" if nothing did: the rank that writes must not leave the others waiting.
    """

    error = ""
    background = False  # whether a write goes on after save_checkpoint has returned

    def finish(self) -> str:
        """Waits for the last write, and says what went wrong with it."""
        return self.error

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """storage_options: the checksums of files beside it, by their names from here."""
        path, self.error = Path(path), ""
        checksum = checksum_of(path)
        drafts = [final.with_suffix(".partial") for final in (path, checksum)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with drafts[0].open("wb") as file:
                hashing = HashingFile(file)
                try:
                    torch.save(checkpoint, hashing)
                except RuntimeError as error:  # what torch makes of a failed write
                    raise hashing.error or error from None
                sync(file)
            with drafts[1].open("wb") as file:
                digests = {path.name: hashing.digest.hexdigest(), **(storage_options or {})}
                file.write("".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode())
                sync(file)
            drafts[1].replace(checksum)
            drafts[0].replace(path)
            sync_folder(path.parent)
        except OSError as error:
            self.error = error.strerror or str(error)
            for draft in drafts:
                draft.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Weights only, whatever Lightning thinks."""
        return read(path)


def read(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint with whole tensors, on the CPU. Weights only, so that what is in it can't run code."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    return read_whole(checkpoint, Path(path)) if SHARDED in checkpoint else checkpoint


class HashingFile:
    """What torch.save needs of a file, with the SHA-256 of what went through it and the error that torch hides."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            count = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return count

    def flush(self) -> None:
        self.file.flush()


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in it last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mark(path: Path) -> None:
    """As one that stays, whatever `keep` says later. A full disk is a warning: it stays under this `keep`."""
    try:
        path.with_suffix(".keep").touch()
    except OSError as error:
        print(f"warning: {path.with_suffix('.keep')} could not be written ({error.strerror})", flush=True)


def step_of(path: Path) -> int:
    """Of any file in the folder."""
    return int(path.name.removeprefix("step-").partition(".")[0])


def remove(folder: Path, condition: Any) -> None:
    """The files of every step for which condition(step) is true, and all drafts. A checkpoint goes before its checksum
    does."""
    for path in sorted(folder.glob("step-[0-9]*")):
        if condition(step_of(path)) or path.suffix == ".partial":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def what_is_wrong(path: Path) -> str:
    """With a checkpoint, in a few words; "" if it is whole. Reads all of it, at one to two GB/s."""
    try:
        expected = [line.split(maxsplit=1) for line in checksum_of(path).read_text().splitlines()]
        files = {name: (path.parent / name, digest) for digest, name in expected}
        if len(expected) == 1:  # a whole one, whatever it is called by now
            files = {path.name: (path, expected[0][0])}
        if path.name not in files:
            return "its checksum is missing"
        for name, (file, digest) in files.items():
            if sha256(file) != digest:
                which = "" if file == path else f" of {name}"
                return f"its {file.stat().st_size:,} bytes{which} do not have the checksum they had"
    except FileNotFoundError as error:
        return "its checksum is missing" if error.filename == str(checksum_of(path)) else f"{error.filename} is missing"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def newest_whole(folder: Path, until: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, of at most the step `until`, None where none was ever written; and a
    sentence for every newer one that is not. Raises ValueError if there are some and none is whole."""
    torn: list[str] = []
    for path in sorted(folder.glob("step-[0-9]*.ckpt"), reverse=True):
        if until is not None and step_of(path) > until:
            continue
        if not (wrong := what_is_wrong(path)):
            return path, torn
        torn.append(f"{path} is torn: {wrong}")
    if torn:
        raise ValueError(
            "\n       ".join([*torn, "No checkpoint is whole. To begin anew: overwrite=true, or another name="])
        )
    return None, []
