"""Kill training runs at random moments, give the same command again until each is finished, and compare what is left
with the run that nobody disturbed: every number of the last checkpoint (weights, optimizer, schedule, counters, random
state) and of metrics.csv, bit for bit.

    python scripts/faults.py --kills 200 --seed 0

One process or two (gloo), with and without loader workers; SIGKILL, SIGTERM and SIGUSR1, to one rank or to all, while
the run starts, computes, writes a checkpoint, validates or finishes; and SIGKILL after which the newest checkpoint is
cut short or has a byte changed. On a CPU. Most processes are forked
from this one, which has imported everything, and call train.py's main with the command line's words; one in 25 starts
as the command does.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import conf.checks  # noqa: F401  # what train.py imports late
from models.training.logger import cells
from models.training.preemption import UNFINISHED
from models.training.watchdog import Watchdog
from scripts.scaled.forked import ROOT, forked

NUM_STEPS = 40
SETTINGS = [
    "name=run",
    "data=mqar",
    "data.vocab_size=64",
    "data.num_pairs=4",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=1",
    "seq_len=32",
    "batch_tokens=128",
    f"tokens={128 * NUM_STEPS}",
    "validation_tokens=256",
    "validate_every=8",
    "checkpoint_every=3",
    "log_every=1",
    "guard.timeout=60",
    "~callbacks.plot",
    "callbacks.regression.picture_share=null",
    "trainer.accelerator=cpu",
]
PHASES = {  # how the watchdog's words begin -> what this script calls it
    "starting": "start",
    "computing": "step",
    "waiting for its data loader, for step": "step",
    "waiting for its data loader, for the validation": "validation",
    "validating": "validation",
    "writing": "checkpoint",
    "finishing": "finish",
}
NAMES = ["", *dict.fromkeys(PHASES.values())]
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}
LONGEST = 120.0  # seconds that a process may take to end after a signal, or a whole run


class Launch:
    """One process or two, started with the same words; `entries` counts how often the first has entered a phase."""

    def __init__(self, runs: Path, words: list[str], world_size: int, command: bool) -> None:
        self.log = (runs / "log.txt").open("ab")
        self.shared = mmap.mmap(-1, len(NAMES))  # the number of times, modulo 256, that a phase has begun
        environment = {"RUNS": str(runs), "TTR_CACHE": str(runs / "cache"), "OMP_NUM_THREADS": "1"}
        self.command = command
        if command:
            arguments = [sys.executable, "train.py", *words]
            out: dict[str, Any] = {"stdout": self.log, "stderr": self.log, "start_new_session": True}
            self.pids = [subprocess.Popen(arguments, cwd=ROOT, env=os.environ | environment, **out).pid]
            return
        if world_size > 1:  # what torchrun sets
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "faults"}
            environment |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0"}
        self.pids = []
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            self.pids.append(self._fork(environment | own, words))

    def _fork(self, environment: dict[str, str], words: list[str]) -> int:
        def first() -> None:
            Watchdog.now = self._telling(Watchdog.now)

        return forked(words, environment, self.log, first)

    def _telling(self, now: Any) -> Any:
        def telling(watchdog: Watchdog, doing: str) -> None:
            now(watchdog, doing)
            if watchdog.rank == 0:
                phase = next(phase for words, phase in PHASES.items() if doing.startswith(words))
                i = NAMES.index(phase)
                self.shared[i] = (self.shared[i] + 1) % 256
                self.shared[0] = i

        return telling

    def ended(self) -> bool:
        """Whether any process has. Leaves it to be waited for."""
        return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self.pids)

    def wait(self) -> list[int]:
        """The exit codes, as subprocess has them. A rank that is left alone must end by itself."""
        codes, deadline = [], time.monotonic() + LONGEST
        for pid in self.pids:
            while not (found := os.waitpid(pid, os.WNOHANG))[0]:
                if time.monotonic() > deadline:
                    raise SystemExit(f"process {pid} did not end within {LONGEST:.0f} s; see {self.log.name}")
                time.sleep(0.001)
            codes.append(os.waitstatus_to_exitcode(found[1]))
        if self.command:  # the ranks that Lightning started
            group = self.pids[0]
            while subprocess.run(["pgrep", "-g", str(group)], capture_output=True, check=False).stdout:
                if time.monotonic() > deadline:
                    raise SystemExit(f"process group {group} did not end within {LONGEST:.0f} s; see {self.log.name}")
                time.sleep(0.05)
        return codes


def disturb(launch: Launch, moment: str, number: signal.Signals, chance: random.Random, run: Path) -> str:
    """Sends the signal at that moment. Returns the phase that it met, "" if the run ended before."""
    at = chance.randrange(1, 6) if moment == "step" else 1 + chance.randrange(2) * (moment != "start")
    jitter = chance.expovariate(
        1 / {"start": 0.3, "step": 0.01, "checkpoint": 0.004, "validation": 0.005}.get(moment, 0.05)
    )
    rows = number_of_rows(run) + chance.randrange(1, 10)
    deadline = time.monotonic() + LONGEST
    while not launch.ended():
        if launch.command:
            here = number_of_rows(run) >= rows
        else:
            here = launch.shared[0] == NAMES.index(moment) and launch.shared[NAMES.index(moment)] >= at
        if here:
            time.sleep(jitter)
            break
        if time.monotonic() > deadline:
            raise SystemExit(f"no {moment} within {LONGEST:.0f} s; see {launch.log.name}")
        time.sleep(0.0002)
    if launch.ended():
        return ""
    met = "command" if launch.command else NAMES[launch.shared[0]]
    for pid in launch.pids if chance.random() < 0.5 else [chance.choice(launch.pids)]:
        os.kill(pid, number)
    return met


def number_of_rows(run: Path) -> int:
    path = run / "metrics.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def tear(run: Path, chance: random.Random) -> str:
    """Damages the newest checkpoint, if there is another. Returns how."""
    files = sorted((run / "checkpoints").glob("step-[0-9]*.ckpt"))
    if len(files) < 2:
        return ""
    size = files[-1].stat().st_size
    with files[-1].open("r+b") as file:
        if chance.random() < 0.5:
            size = chance.choice([0, chance.randrange(size), size - 1])
            file.truncate(size)
            return f"cut to {size:,} bytes"
        position = chance.randrange(size)
        file.seek(position)
        byte = file.read(1)[0] ^ 1 << chance.randrange(8)
        file.seek(position)
        file.write(bytes([byte]))
        return f"byte {position:,} changed"


def state(run: Path) -> dict[str, Any]:
    """What must not depend on what happened on the way."""
    last = max((run / "checkpoints").glob("step-[0-9]*.ckpt"))
    checkpoint = torch.load(last, weights_only=True)
    rows = [
        {k: v for k, v in row.items() if not k.startswith("speed/")} for row in cells((run / "metrics.csv").read_text())
    ]
    result = json.loads((run / "result.json").read_text())
    result = {name: value for name, value in result.items() if name.startswith("validation/")}
    weights = (run / "model/model.safetensors").read_bytes()
    return {"name": last.name, "checkpoint": checkpoint, "rows": rows, "result": result, "weights": weights}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        return [x for k in a.keys() | b.keys() for x in differences(a.get(k), b.get(k), f"{path}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [x for i, (p, q) in enumerate(zip(a, b, strict=True)) for x in differences(p, q, f"{path}[{i}]")]
    return [] if type(a) is type(b) and a == b else [f"{path}: {str(a)[:40]} and {str(b)[:40]}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="at least as many (200)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance, started = random.Random(arguments.seed), time.monotonic()
    kills: Counter[tuple[str, str, int]] = Counter()
    runs = equal = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        references = {}
        while sum(kills.values()) < arguments.kills:
            world_size = 1 + runs % 2
            words = [*SETTINGS, f"num_workers={int(chance.random() < 0.25)}"]
            words += [f"micro_batch={2 // world_size}"]  # of 4 sequences: two micro-batches a step
            words += ["strategy=ddp", "trainer.devices=2"] if world_size == 2 else []
            if world_size not in references:
                references[world_size] = finished(Path(scratch, f"undisturbed-{world_size}"), words, world_size)
            folder = Path(scratch, f"{runs}")
            folder.mkdir()
            left = min(chance.randrange(8, 16), arguments.kills - sum(kills.values()))
            while left > 0:
                launch = Launch(folder, words, world_size, command=chance.random() < 0.04)
                kind = chance.choice([*SIGNALS, "KILL, torn"])
                name = kind.partition(",")[0]
                moment = chance.choices(["start", "step", "checkpoint", "validation", "finish"], [1, 4, 4, 4, 1])[0]
                met = disturb(launch, moment, SIGNALS[name], chance, folder / "run")
                codes = launch.wait()
                if not met:
                    if any(codes):
                        raise SystemExit(f"the run failed with {codes}; this was said:\n{said(folder)}")
                    break  # it was finished first
                # before its handler stands a signal just kills; after the last step it does not matter
                expected = {"KILL": {-9}, "TERM": {UNFINISHED, -15, 0}, "USR1": {UNFINISHED, -10, 0}}[name]
                if not expected & set(codes):
                    raise SystemExit(f"SIG{name} while {met} gave {codes}:\n{said(folder)}")
                how = tear(folder / "run", chance) if "torn" in kind else ""
                kills[kind if how or "torn" not in kind else "KILL", met, world_size] += 1
                left -= 1
                n = sum(kills.values())
                where = f"run {runs}, {world_size} process{'es' * (world_size > 1)}"
                print(f"{n:4d}  {where}: SIG{name} in {met}, exit {codes} {how}", flush=True)
                if 0 in codes:
                    break
            found = differences(references[world_size], finished(folder, words, world_size))
            runs, equal = runs + 1, equal + (not found)
            print(f"      run {runs - 1} is finished: {'equal, bit for bit' if not found else found[:8]}", flush=True)
            if found:
                print(said(folder))
    report(kills, runs, equal, arguments.seed, time.monotonic() - started)
    sys.exit(equal < runs)


def said(folder: Path) -> str:
    return (folder / "log.txt").read_text()[-6000:]


def finished(folder: Path, words: list[str], world_size: int) -> dict[str, Any]:
    """The state of a run that is given the same command, undisturbed."""
    folder.mkdir(exist_ok=True)
    codes = Launch(folder, words, world_size, command=False).wait()
    if any(codes) or not (folder / "run" / "result.json").exists():
        raise SystemExit(f"the undisturbed command failed with {codes}:\n{said(folder)}")
    found = state(folder / "run")
    steps = [row["step"] for row in found["rows"]]
    assert steps == [str(i) for i in range(NUM_STEPS)], f"steps lost or repeated: {steps}"
    return found


def report(kills: Counter[tuple[str, str, int]], runs: int, equal: int, seed: int, seconds: float) -> None:
    moments = list(dict.fromkeys([*NAMES[1:], "command"]))
    print(f"\nseed {seed}\n{'signal':<14}{'processes':<12}" + "".join(f"{m:>12}" for m in moments) + f"{'all':>8}")
    for kind in (*SIGNALS, "KILL, torn"):
        for world_size in (1, 2):
            counts = [kills[kind, moment, world_size] for moment in moments]
            print(f"{kind:<14}{world_size:<12}" + "".join(f"{c:>12}" for c in counts) + f"{sum(counts):>8}")
    print(
        f"{sum(kills.values())} kills in {runs} runs, {equal} of which ended as if there had been none; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
