"""How fast text becomes token shards, and in how much memory: scripts/prepare_data.py itself, timed from outside. And
how fast a loader reads them.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.batch import batch_arithmetic
from data.corpora import PythonSource
from data.files import TextFiles
from data.module import collate
from data.order import GlobalOrder
from data.prepare import prepare as write_shards
from data.shards import TokenShards
from data.text import Sequences
from data.tokenizer import Bytes

ROOT = Path(__file__).parents[2]
ROWS = 8  # of a micro-batch


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


def loader(megabytes: int, lengths: list[int], num_workers: int, repeats: int) -> None:
    """Batches as training gets them, beside rows of a memory map: the same tokens in the same order, as int64, without
    labels and documents. Each `repeats` times, in turn; the median.
    """
    with tempfile.TemporaryDirectory() as folder:
        text, prepared = Path(folder, "text.jsonl"), Path(folder, "shards")
        size = write_text(text, megabytes)
        print(f"{size / 1e6:,.0f} MB of text in bytes, batches of {ROWS} rows, {os.cpu_count()} cores", flush=True)
        write_shards(TextFiles(str(text)), Bytes(), prepared)
        for seq_len in lengths:
            samples = Sequences(TokenShards(prepared, "train"), seq_len, "text")
            steps = len(samples) // ROWS
            batch = batch_arithmetic(ROWS * seq_len, seq_len, ROWS, 1, steps * ROWS * seq_len)
            order = list(GlobalOrder(len(samples), batch, seed=0))
            ways = {"a plain memory map": partial(mapped, prepared, order, seq_len)}
            for workers in sorted({0, num_workers}):
                ways[f"the loader, num_workers={workers}"] = partial(loaded, samples, order, workers)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(repeats):
                for name, way in ways.items():
                    times[name].append(timed(way))
            tokens = steps * ROWS * seq_len / 1e6
            for name, found in times.items():
                wall, cpu = (statistics.median(each) for each in zip(*found, strict=True))
                said = f"{tokens / wall:6.1f} M tokens/s, {tokens / cpu:6.1f} a second of a core"
                print(f"seq_len={seq_len:<6} {name:<26} {said} (load {os.getloadavg()[0]:.1f})", flush=True)


def mapped(folder: Path, order: list[list[int]], seq_len: int) -> None:
    tokens = np.memmap(folder / "train_00000.bin", TokenShards(folder, "train").dtype, mode="r")
    for rows in order:
        torch.from_numpy(np.stack([tokens[i * seq_len : (i + 1) * seq_len] for i in rows]).astype(np.int64))


def loaded(samples: Sequences, order: list[list[int]], num_workers: int) -> None:
    for _ in DataLoader(samples, batch_sampler=order, collate_fn=collate, num_workers=num_workers):
        pass


def timed(way: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and seconds of cores: of this process and of those that it started and that have ended."""

    def used() -> float:
        each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in each)

    begin, before = time.perf_counter(), used()
    way()
    gc.collect()  # which ends a loader's workers
    return time.perf_counter() - begin, used() - before


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
