"""Kill runs while every device writes its part of a checkpoint in the background, give the command again on another
number of devices and under another strategy until the run is finished, and compare its losses with those of a run on
one device that nobody disturbed.

    python scripts/shard_faults.py --kills 30 --seed 0

After each kill every checkpoint that has its name must be whole. On a CPU, by gloo, with one, two and four processes.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import conf.checks  # noqa: F401  # with the next line, what train.py imports late
import models.training.job  # noqa: F401
from models.training.checkpoint import step_of, what_is_wrong
from models.training.preemption import UNFINISHED
from scripts.scaled.faults import EXACT, ROUNDING, SMALL, STEPS
from scripts.scaled.launch import PAUSE, Run

SHARDS = "trainer.strategy.checkpoint=sharded"
PLACES = {  # and how often each is taken
    "one device": (1, [], 1),
    "ddp x2": (2, ["strategy=ddp"], 1),
    "fsdp x2": (2, ["strategy=fsdp", SHARDS], 3),
    "fsdp x4": (4, ["strategy=fsdp", SHARDS], 3),
    "hsdp x4": (4, ["strategy=hsdp", "trainer.strategy.replicas=2", SHARDS], 3),
}
WORDS = [*SMALL, *EXACT, "checkpoint_every=1", "trainer.accelerator=cpu"]
LONGEST = 120.0  # seconds of a start


def launch(folder: Path, place: str) -> Run:
    devices, words, _ = PLACES[place]
    return Run(folder, [*WORDS, *words], range(devices))


def wait(run: Run, rows: int | None = None) -> None:
    """Until metrics.csv has as many rows, or the end."""
    deadline = time.monotonic() + LONGEST
    while not run.ended() and (rows is None or len(run.rows()) < rows):
        if time.monotonic() > deadline:
            run.end()
            raise SystemExit(f"not done within {LONGEST:.0f} s; see {run.log}:\n{run.said()}")
        time.sleep(PAUSE)


def being_written(checkpoints: Path) -> set[int]:
    """Steps of which there are shards, and not yet a checkpoint."""
    shards, files = ({step_of(path) for path in checkpoints.glob(f"step-[0-9]*.{end}")} for end in ("shards", "ckpt"))
    return shards - files


def whole(checkpoints: Path) -> tuple[int, bool]:
    """The step of the newest, and whether one that was not yet there was being written. Ends where one is torn."""
    there = {step_of(path): path for path in checkpoints.glob("step-[0-9]*.ckpt")}
    if torn := {step: wrong for step, path in there.items() if (wrong := what_is_wrong(path))}:
        raise SystemExit(f"a checkpoint in {checkpoints} has its name and is torn: {torn}")
    return max(there, default=0), bool(being_written(checkpoints))


def disturb(folder: Path, place: str, number: signal.Signals, chance: random.Random) -> tuple[bool, str]:
    """One start and one signal, to one process or to all. Whether it met the run, and what to say of it."""
    run = launch(folder, place)
    try:
        before = len(run.rows())
        wait(run, before + chance.randrange(1, 6))
        if SHARDS in PLACES[place][1] and chance.random() < 0.7:
            while not run.ended() and not being_written(run.folder / "checkpoints"):
                time.sleep(0.0005)
        time.sleep(chance.expovariate(1 / 0.01))
        if met := not run.ended():
            run.send(number, None if chance.random() < 0.5 else [chance.randrange(len(run.pids))])
            wait(run)
        expected = {-number} if number == signal.SIGKILL else {UNFINISHED}
        if (met and not expected & set(run.codes)) or (not met and any(run.codes)):
            raise SystemExit(f"{number.name} gave {run.codes}: {run.said()}")
        step, writing = whole(run.folder / "checkpoints")
        return met, f"{place:<11} {number.name:<8} newest {step:3d}{', while one was written' if writing else ''}"
    finally:
        run.end()


def finished(folder: Path, place: str) -> list[float]:
    """The losses of all steps."""
    run = launch(folder, place)
    wait(run)
    if any(run.codes):
        raise SystemExit(f"{place}: {run.codes}: {run.said()}")
    whole(run.folder / "checkpoints")
    steps = [int(row["step"]) for row in run.rows()]
    assert steps == list(range(STEPS)), f"steps lost or repeated: {steps}"
    return [row["train/loss"] for row in run.rows()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chance, names = random.Random(given.seed), list(PLACES)
    weights = [often for _, _, often in PLACES.values()]
    kills = writing = runs = 0
    largest = 0.0
    with tempfile.TemporaryDirectory(prefix="shard-faults-") as scratch:
        expected = finished(Path(scratch, "undisturbed"), names[0])
        while kills < given.kills:
            folder = Path(scratch, str(runs))
            for _ in range(chance.randrange(3, 7)):
                number = signal.SIGKILL if chance.random() < 0.8 else signal.SIGTERM
                met, said = disturb(folder, chance.choices(names, weights)[0], number, chance)
                kills, writing = kills + met, writing + ("while one" in said)
                print(f"{kills:4d}  run {runs}: {said}{'' if met else ' (finished before)'}", flush=True)
                if not met or kills == given.kills:
                    break
            place = chance.choices(names, weights)[0]
            pairs = zip(finished(folder, place), expected, strict=True)
            apart = max(abs(a - b) / abs(b) for a, b in pairs)
            runs, largest = runs + 1, max(largest, apart)
            print(f"      run {runs - 1} is finished, on {place}: losses differ by {apart:.1e}", flush=True)
    print(f"{kills} signals, {writing} while a checkpoint was written, in {runs} runs; losses differ by {largest:.1e}")
    sys.exit(largest > ROUNDING["float32"])


if __name__ == "__main__":
    main()
