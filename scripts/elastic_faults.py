"""Kills nodes of an elastic run on this machine, and compares what the others make of it with an undisturbed run.

    python scripts/elastic_faults.py                      # two nodes, of which one dies; about two minutes of a core
    python scripts/elastic_faults.py --nodes 3 --kills 2
    python scripts/elastic_faults.py --nodes 1 --processes 2 --kills 2    # one node, of which a process dies, twice

A node is a torchrun with one process, on a CPU by gloo. Killed are all processes of a node at once, by SIGKILL, when a
step after a checkpoint has ended; the first node, on which they meet, stays. With several processes a node, one process
of the first node is killed and torchrun stays: the last one, then the first one, and so on. The run must end, with
every step once and the losses of a run of one process. What the processes print is in a file that is named where
something is wrong.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.training.logger import read_metrics
from scripts.scaled.faults import EXACT, ROUNDING, SMALL, STEPS
from scripts.scaled.launch import ROOT

# found out sooner than by default that a node is gone, and not waited for in vain
PATIENCE = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3,join_timeout=60"
WORDS = [*SMALL, *EXACT, "name=run", "trainer.accelerator=cpu", "micro_batch=1", "guard.timeout=30"]


def losses(folder: Path) -> list[float]:
    path = folder / "run" / "metrics.csv"
    rows = [row for row in read_metrics(path) if "train/loss" in row] if path.exists() else []
    assert [int(row["step"]) for row in rows] == list(range(len(rows))), "steps are lost or repeated"
    return [row["train/loss"] for row in rows]


def start(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"RUNS": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def until(folder: Path, rows: int, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while len(losses(folder)) < rows and process.poll() is None:
        if time.monotonic() > deadline:
            sys.exit(f"not at step {rows} within {seconds:.0f} s; see {folder}/log.txt")
        time.sleep(0.05)


def opened(port: int, seconds: float) -> None:
    """Waits until the first node has opened it: another one on this machine may be sooner, and is to be killed."""
    deadline = time.monotonic() + seconds
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):
            if time.monotonic() > deadline:
                sys.exit(f"torchrun has not opened port {port} within {seconds:.0f} s")
            time.sleep(0.05)


def started_by(process: subprocess.Popen[bytes]) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def killed(process: subprocess.Popen[bytes]) -> None:
    """The node's processes: torchrun leads a session, and so does each of what it has started."""
    for pid in (process.pid, *started_by(process)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="of a node; of several only processes are killed")
    parser.add_argument("--kills", type=int, default=1, help="fewer than nodes, or at most three of processes")
    parser.add_argument("--seconds", type=float, default=300, help="that a part may take")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="elastic-"))
    alone = start(folder / "alone", [sys.executable, "train.py", *WORDS])
    until(folder / "alone", STEPS + 1, alone, given.seconds)
    exact = losses(folder / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes=1:{given.nodes}",
               f"--nproc-per-node={given.processes}", "--max-restarts=3", "--rdzv-backend=c10d",
               f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic", f"--rdzv-conf={PATIENCE}",
               "train.py", "strategy=ddp", *WORDS]  # fmt: skip
    what = "node" if given.processes == 1 else "process"
    nodes = [start(folder / "elastic", command)]
    try:
        opened(port, given.seconds)
        nodes += [start(folder / "elastic", command) for _ in range(1, given.nodes)]
        for i in range(given.kills):
            until(folder / "elastic", 6 + i * (STEPS - 12) // max(1, given.kills), nodes[0], given.seconds)
            if what == "node":
                killed(nodes.pop())
            else:
                os.kill(started_by(nodes[0])[i % 2 - 1], signal.SIGKILL)
            print(f"a {what} was killed after step {len(losses(folder / 'elastic'))}", flush=True)
        until(folder / "elastic", STEPS + 1, nodes[0], given.seconds)
        code = nodes[0].wait()
    finally:
        for node in nodes:
            if node.poll() is None:
                killed(node)
    found = losses(folder / "elastic")
    far = max((abs(a - b) / b for a, b in zip(found, exact, strict=False)), default=0.0)
    print(f"exit code {code}; {len(found)} of {STEPS} steps, each once; losses differ by a part of {far:.1e} at most")
    if code or len(found) < STEPS or far > ROUNDING["float32"]:
        sys.exit(f"error: see {folder}/elastic/log.txt")


if __name__ == "__main__":
    main()
