"""How fast text becomes token shards, and in how much memory: scripts/prepare_data.py itself, timed from outside."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.corpora import PythonSource

ROOT = Path(__file__).parents[2]


def prepare(megabytes: int, tokenizer: str, num_workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.jsonl")
        size = write_text(text, megabytes)
        print(f"{size / 1e6:,.0f} MB of text; tokenizer={tokenizer} num_workers={num_workers}", flush=True)
        command = [sys.executable, "scripts/prepare_data.py", "data=text_files", f"data.corpus.path={text}"]
        command += [f"tokenizer={tokenizer}", f"num_workers={num_workers}"]
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TTR_CACHE": f"{folder}/cache"})
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.5)
        seconds = time.perf_counter() - begin
        if process.returncode:
            sys.exit(process.returncode)
    usage, load = resource.getrusage(resource.RUSAGE_CHILDREN), os.getloadavg()[0]
    cpu = usage.ru_utime + usage.ru_stime
    print(f"{size / seconds / 1e6:.1f} MB/s: {seconds:.1f} s from the command to its end")
    print(f"{size / cpu / 1e6:.1f} MB/s of a core: {cpu:.1f} s of the cores were its own (load {load:.1f})")
    print(f"{peak / 1e9:.2f} GB of memory at most, workers included; {os.cpu_count()} cores")


def write_text(path: Path, megabytes: int) -> int:
    """The standard library again and again, with its lines in another order within each file. Returns the bytes."""
    documents = [document.text for document in PythonSource()]
    size, draw = 0, random.Random(0)
    with path.open("w") as file:
        while True:
            for text in documents:
                lines = text.splitlines(keepends=True)
                draw.shuffle(lines)
                text = "".join(lines)
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size >= megabytes * 1e6:
                    return size


def memory(pid: int) -> int:
    """Bytes of a process and its children, what they share counted once (Linux: the proportional set size)."""
    total, waiting = 0, [pid]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
            waiting += [
                int(child) for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()
            ]
        except OSError:  # ended meanwhile
            continue
    return total
