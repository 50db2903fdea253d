"""How fast runs are, and what they hold: the rows that are timed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from models.training.captured import WARM_UP
from models.training.traced import FILE
from scripts import prepare_data
from scripts.scaled.launch import Run, Scratch

GPU_WORDS = ["data=python_source", "tokenizer=bpe", "recompute=none"]
TOY_WORDS = ["data=mqar", "data.vocab_size=64", "data.num_pairs=4", "model.hidden_size=32", "model.num_layers=2",
             "model.num_heads=1", "seq_len=32", "batch_tokens=512", "micro_batch=2", "validation_tokens=64",
             "trainer.accelerator=cpu"]  # fmt: skip
ALONE = ["log_every=1", "validate_every=1000000", "checkpoint_every=1000000", "guard.timeout=120", "~callbacks.plot",
         "~callbacks.sample", "~callbacks.regression"]  # fmt: skip
HELD_OUT = "data.corpus.validation_fraction=0.2"  # of python_source: more than one sequence of 262,144 tokens
TRACED = 30.0  # seconds in which the step that is traced, after those that are timed, is to be there
FIRST = 1  # steps before those that are timed: they compile, and record
UNEVEN = 0.1  # more than so much between the mean and the median of its steps, and a row is compared with no other


class Case(NamedTuple):
    """A run to be timed: by what name, on how many devices, with which words; beside which row it is to be seen, how
    much of each GPU's memory it may take, and after how many steps it is timed."""

    name: str
    item: str
    devices: int
    words: list[str]
    beside: str = ""
    memory_gb: float | None = None
    first: int = FIRST


@dataclass
class Timed:
    """tokens_per_second: by the clock, over the steps that were timed. step: the median of them in seconds, as the run
    itself reports; tokens: of a step. of_linear: beside `devices` times the row that it is compared with. peak_gb: what
    torch has held at most on the first device; held_gb: what each device's driver counts at the end, everything
    included. first_s: until the first step was done. losses: of each step. whole_for: what `auto` was. sent: the bytes
    that a device sends in a step, by the formulas (sending.py). traced: what the first of several GPUs did in a later
    step (models/training/traced.py). date, commit, torch: of this row.
    """

    name: str
    devices: int
    words: list[str]
    beside: str = ""
    tokens_per_second: float | None = None
    step: float | None = None
    tokens: float | None = None
    of_linear: float | None = None
    peak_gb: float | None = None
    held_gb: list[float] = field(default_factory=list)
    first_s: float | None = None
    losses: list[float] = field(default_factory=list)
    reason: str = ""
    memory: str = ""
    whole_for: str | None = None
    sent: dict[str, float] | None = None
    traced: dict[str, Any] | None = None
    date: str = ""
    commit: str = ""
    torch: str = ""

    def __str__(self) -> str:
        def shown(x: float | None, form: str) -> str:
            return "" if x is None else format(x, form)

        held = " ".join(f"{x:.1f}" for x in self.held_gb)
        return (
            f"{self.name:<34}{self.devices:>4}{shown(self.tokens_per_second, ',.0f'):>12}{shown(self.step, '.3f'):>9}"
            f"{shown(self.of_linear, '.3f'):>8}{shown(self.peak_gb, '.1f'):>8}{shown(self.first_s, '.1f'):>8}"
            f"  {held}  {self.reason or self.memory}"
        )


HEAD = f"{'':<34}{'GPUs':>4}{'tokens/s':>12}{'s/step':>9}{'linear':>8}{'peak GB':>8}{'first s':>8}  held GB"


def even(row: dict[str, Any]) -> bool:
    """Whether its steps took about the same time. Else something was compiled or recorded in one of them."""
    return abs(row["tokens"] / row["tokens_per_second"] / row["step"] - 1) <= UNEVEN


def cases(count: int, toy: bool) -> list[list[Case]]:
    """Those of one list run side by side."""
    model = ["model=gated_delta", *([] if toy else ["size=340m"])]
    worlds = [n for n in (2, 4, 8) if n <= count]
    block, whole = "trainer.strategy.whole_for=block", "trainer.strategy.whole_for=pass"
    double = [] if toy else ["micro_batch=32"]
    plain, sequence = ["cuda_graph=false"], "seq_len=128" if toy else "seq_len=262144"
    long = [sequence, f"batch_tokens={sequence.split('=')[1]}", "micro_batch=1"] + (
        [] if toy else ["recompute=all", HELD_OUT]
    )

    def of(item: str, name: str, n: int, words: Sequence[str], beside: str = "one", first: int = FIRST) -> list[Case]:
        return [Case(name, item, n, [*words], beside, first=first)]

    one = [*of("one", "one", 1, model, ""), *of("one", "one, no graph", 1, model + plain, "")][: min(2, count)]
    found = [one]
    for n in reversed(worlds):
        found += [of("ddp", f"ddp x{n}", n, [*model, "strategy=ddp"])]
        found += [of("fsdp", f"fsdp x{n}", n, [*model, "strategy=fsdp"])]
    for n in worlds[-1:]:
        replicas = [*model, "strategy=hsdp", "trainer.strategy.replicas=2"]
        found += [of("hsdp", f"hsdp x{n}", n, replicas)]
        found += [of("block", f"fsdp x{n}, block", n, [*model, "strategy=fsdp", block])]
        found += [of("block", f"hsdp x{n}, block", n, [*replicas, block])]
        words = [*model, *long, "strategy=ddp", f"context_parallel={n}"]
        found += [of("context", f"context_parallel={n}, {sequence}", n, words, f"one, {sequence}")]
        found += [of("context", f"one, {sequence}", 1, [*model, *long], "", WARM_UP + 1)]  # a step is one micro-batch
        found += [of("more", f"ddp x{n}, no graph", n, [*model, "strategy=ddp", *plain], "one, no graph")]
        found += [of("more", f"fsdp x{n}, pass", n, [*model, "strategy=fsdp", whole])]
        found += [of("more", f"fsdp x{n}, block, 32", n, [*model, "strategy=fsdp", block, *double])]
        found += [of("more", f"fsdp x{n}, 32", n, [*model, "strategy=fsdp", *double])]
        half = ["trainer.strategy.reduction=bfloat16"]
        found += [of("bf16", f"ddp x{n}, bf16", n, [*model, "strategy=ddp", *half])]
        found += [of("bf16", f"fsdp x{n}, bf16", n, [*model, "strategy=fsdp", *half])]
    found += large_cases(worlds[-1:], toy)
    return found


def large_cases(worlds: Sequence[int], toy: bool) -> list[list[Case]]:
    """1.3 billion parameters on a card of 80 GB, then on all. A step is of eight micro-batches a device: one of a
    million tokens takes a GPU 20 s."""
    size, limit, wide = (
        (["model=gated_delta"], None, []) if toy else (["model=gated_delta", "size=1300m"], 80, ["micro_batch=8"])
    )
    batch = {n: [] if toy else [f"batch_tokens={8 * 4 * 4096 * n}"] for n in (1, *worlds)}
    auto, name = ["recompute=auto"], "1300m, 80 GB"

    def card(more: str, words: list[str]) -> Case:
        return Case(name + more, "card", 1, [*size, *batch[1], *words], "", limit)

    pair = [card("", auto), card(", all recomputed", ["recompute=all"])]
    found = [pair] if worlds else [[each] for each in pair]
    for n in worlds:
        words = [*size, *batch[n], "strategy=fsdp", *auto]
        found += [[Case(f"1300m fsdp x{n}", "1300m", n, words, name)]]
        found += [[Case(f"1300m fsdp x{n}, block", "block", n, [*words, "trainer.strategy.whole_for=block"], name)]]
    return [*found, [card(", micro_batch=8", [*wide, *auto])]]


def warming(groups: Sequence[Sequence[Case]]) -> list[Case]:
    """Runs of a step of one micro-batch a device that leave in torch's caches what those of the cases would compile:
    one of each strategy, size and length, of those on most devices. They hold little, so they run side by side.
    """
    found: dict[tuple[str, ...], Case] = {}
    for case in sorted((case for group in groups for case in group), key=lambda case: -case.devices):
        sizes = [word for word in case.words if word.startswith(("size=", "seq_len=", "micro_batch="))]
        kind = [word.replace("hsdp", "fsdp") for word in case.words if word.startswith("strategy=")]
        if case.item in ("more", "block"):  # they come late, if at all; and a block is compiled alike
            continue
        if case.devices > 1 or not any(set(sizes) <= set(key) for key in found):
            found.setdefault((*sizes, *kind), case)
    return list(found.values())


def warm(case: Case, first: int, scratch: Scratch, fork: bool) -> Iterator[None]:
    """Gives way until the run has made its step."""
    words = [word for word in case.words if not word.startswith(("batch_tokens=", "recompute="))]
    words = [*GPU_WORDS, *ALONE, *words, "recompute=all", f"batch_tokens={2**18}", f"tokens={2**22}"]
    run = Run(scratch.folder(f"warm {case.name}"), words, range(first, first + case.devices), fork)
    try:
        yield from run.until(1)
    except GeneratorExit:  # its time is over
        print(f"{case.name}, not compiled: {run.where() or run.said()}", flush=True)
        raise
    finally:
        run.end()


def measured(case: Case, first: int, scratch: Scratch, toy: bool, steps: int, fork: bool) -> Iterator[Timed | None]:
    """Gives way with None until the model is built, on the CPU; then, stopped, once with the row, for the GPUs may be
    another's still; then with the row that grows, until it is whole. first: the place of the first device."""
    gpus = range(first, first + case.devices)
    row = Timed(case.name, case.devices, case.words, case.beside)
    words = [*(TOY_WORDS if toy else GPU_WORDS), *ALONE, *case.words]
    tokens = 64 * 512 if toy else 10**9
    if case.devices > 1:
        words += ["+callbacks.traced._target_=models.training.traced.Traced", "+callbacks.traced.folder=${run_dir}",
                  f"+callbacks.traced.first={case.first + steps}"]  # fmt: skip
    run = Run(scratch.folder(case.name), [*words, f"tokens={tokens}"], gpus, fork, case.memory_gb)
    began = time.monotonic()
    seen: list[float] = []  # when each step's row was there
    going = False
    try:
        while not run.line("with ") and not run.ended():
            yield None
        run.send(signal.SIGSTOP)
        waited = time.monotonic()
        yield row
        run.send(signal.SIGCONT)
        going = True
        began += time.monotonic() - waited
        while len(seen) < case.first + steps and not run.ended():
            seen += [time.monotonic()] * (len(run.rows()) - len(seen))
            yield row
        seen += [time.monotonic()] * (len(run.rows()) - len(seen))
        row.held_gb = [] if toy else held(gpus)
        late = time.monotonic() + TRACED
        while case.devices > 1 and not (run.folder / FILE).exists() and not run.ended() and time.monotonic() < late:
            yield row
    finally:
        found = run.rows()
        where = run.where() if going and len(seen) < case.first + steps else ""
        run.end()
        row.losses = [each["train/loss"] for each in found]
        row.memory = run.line("memory ")
        if seen:
            row.first_s = seen[0] - began
        if len(seen) < case.first + steps:
            row.reason = where or run.said()
        if told := run.line("shards "):
            row.whole_for = told.partition("whole for a ")[2].split()[0]
    if len(seen) >= case.first + steps:
        timed = found[case.first : case.first + steps]
        each = found[-1]["progress/tokens"] / len(found)
        row.tokens = each
        row.step = median(each / x["speed/tokens_per_second"] for x in timed)
        row.tokens_per_second = each * steps / max(seen[case.first + steps - 1] - seen[case.first - 1], 1e-9)
        row.peak_gb = found[case.first + steps - 1].get("speed/peak_memory_gb")
    if (path := run.folder / FILE).exists():
        row.traced = json.loads(path.read_text()) or None
    yield row


def prepare(*more: str) -> None:
    """The text of the rows, once for all: in a process of its own. more: settings of the data."""

    def words() -> None:
        sys.argv = ["prepare_data.py", *GPU_WORDS[:2], f"num_workers={min(8, os.cpu_count() or 1)}", *more]
        prepare_data.main()

    process = multiprocessing.get_context("fork").Process(target=words)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"error: the data could not be prepared; the process ended with {process.exitcode}")


def held(gpus: Sequence[int]) -> list[float]:
    """1e9 bytes that each GPU's driver counts as taken, by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [float(said[i]) * 2**20 / 1e9 for i in gpus]


def gpus_here() -> list[str]:
    """Their names, by nvidia-smi, for a process that forks must not ask CUDA itself."""
    try:
        said: Any = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    return [line.partition(": ")[2].partition(" (")[0] for line in said.splitlines() if line.startswith("GPU ")]
