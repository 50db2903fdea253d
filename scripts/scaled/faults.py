"""That a run is the same under every strategy and on any number of devices, and after it was killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from models.training.preemption import UNFINISHED
from scripts.scaled.launch import Run, Scratch

STEPS = 40
SMALL = ["data=mqar", "data.vocab_size=64", "data.num_pairs=4", "model.hidden_size=64",
         "model.num_layers=2", "model.num_heads=1", "seq_len=32", "batch_tokens=512", f"tokens={512 * STEPS}",
         "validation_tokens=256", "validate_every=20", "checkpoint_every=4", "log_every=1", "guard.timeout=60",
         "compile=false", "~callbacks.plot", "~callbacks.sample", "~callbacks.regression"]  # fmt: skip
MODELS = ("gated_delta", "softmax")  # whose sequences are shared: a state is handed on, pairs pass by
EXACT = ["trainer.precision=32-true", "model.mixers.main.regressor.backend=torch"]
HALF = ["trainer.precision=bf16-mixed"]
ROUNDING = {"float32": 5e-4, "bfloat16": 0.1}  # of a loss, relative, where 40 steps were added up in another order
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def strategies(devices: int) -> dict[str, list[str]]:
    if devices == 1:
        return {}
    replicas = "trainer.strategy.replicas=2"
    return {"ddp": ["strategy=ddp"], "fsdp": ["strategy=fsdp"], "hsdp": ["strategy=hsdp", replicas],
            "fsdp, step": ["strategy=fsdp", "trainer.strategy.whole_for=step"],
            "fsdp, shards": ["strategy=fsdp", "trainer.strategy.checkpoint=sharded"]}  # fmt: skip


def long(seq_len: int) -> list[str]:
    return ["micro_batch=1", f"seq_len={seq_len}", f"batch_tokens={4 * seq_len}", f"tokens={4 * seq_len * STEPS}"]


class Checks:
    """Generators that give way while they wait, and raise AssertionError where a run fails. What runs lost on the way
    is in `losses`, by their name, and what each is to be compared with, and how closely, in `like`.
    """

    def __init__(self, count: int, scratch: Scratch, toy: bool, fork: bool) -> None:
        self.count, self.scratch, self.fork = count, scratch, fork
        micro_batch = f"micro_batch={max(1, 8 // count)}"  # of 16 sequences: two micro-batches on each device
        self.long = long(512 if toy else 2048)
        self.words = [*SMALL, micro_batch, *(["trainer.accelerator=cpu"] if toy else [])]
        self.losses: dict[str, list[float]] = {}
        self.like: dict[str, tuple[str, float]] = {}
        self.stuck: dict[str, str] = {}  # where the runs were whose time was over

    def runs(self) -> dict[str, Iterator[None]]:
        """Of every strategy from the first step to the last; and of sequences that devices share."""
        n = self.count
        found = {name: self.whole(name, 1, words) for name, words in (("one", EXACT), ("one, bf16", HALF))}
        for name, words in strategies(n).items():
            found |= self._one_more(f"{name} x{n}", [*EXACT, *words], "one", ROUNDING["float32"])
        for name in ("ddp", "fsdp"):
            found |= self._one_more(
                f"{name} x{n}, bf16", [*HALF, f"strategy={name}"], "one, bf16", ROUNDING["bfloat16"]
            )
        for model in MODELS:
            for kind, words in (("float32", EXACT), ("bfloat16", HALF)):
                alone, words = f"{model}, {kind}", [f"model={model}", *self.long, *words]
                found |= {alone: self.whole(alone, 1, words)}
                words = [*words, "strategy=ddp", f"context_parallel={n}"]
                found |= self._one_more(f"{alone}, context_parallel={n}", words, alone, ROUNDING[kind])
        return found

    def kills(self) -> dict[str, Iterator[None]]:
        """And an undisturbed run, to compare them with."""
        found = {"one": self.whole("one", 1, EXACT)}
        for strategy, words in strategies(self.count).items():
            for number in SIGNALS:
                name = f"{strategy} x{self.count}, {number.name}"
                self.like[name] = "one", ROUNDING["float32"]
                found[name] = self.killed(name, words, number)
        return found

    def _one_more(self, name: str, words: Sequence[str], like: str, most: float) -> dict[str, Iterator[None]]:
        self.like[name] = like, most
        return {name: self.whole(name, self.count, words)}

    def whole(self, name: str, devices: int, words: Sequence[str]) -> Iterator[None]:
        with self._run(name, self.scratch.folder(name), words, devices) as run:
            yield from self._to_the_end(run, name)

    def killed(self, name: str, words: Sequence[str], number: signal.Signals) -> Iterator[None]:
        """Killed on all devices, then on half of them, and finished on all: the same command three times."""
        folder = self.scratch.folder(name)
        for devices, rows in ((self.count, 8), (max(1, self.count // 2), 22), (self.count, None)):
            own = words if devices == self.count else strategies(devices).get("ddp", [])
            with self._run(name, folder, [*EXACT, *own], devices) as run:
                if rows is None:
                    yield from self._to_the_end(run, name)
                    continue
                yield from run.until(rows)
                assert not run.ended(), f"it ended with {run.codes} before it was killed: {run.said()}"
                run.send(number, None if number == signal.SIGKILL else [devices - 1])
                yield from run.until(STEPS + 1)
                wanted = -number if number == signal.SIGKILL else UNFINISHED
                assert wanted in run.codes, f"{number.name} on {devices}: exit codes {run.codes}: {run.said()}"

    @contextmanager
    def _run(self, name: str, folder: Path, words: Sequence[str], devices: int) -> Iterator[Run]:
        run = Run(folder, [*self.words, *words], range(devices), self.fork)
        try:
            yield run
        except GeneratorExit:
            self.stuck[name] = f"on {devices}, with {len(run.rows())} steps: {run.where() or run.said()}"
            raise
        finally:
            run.end()

    def _to_the_end(self, run: Run, name: str) -> Iterator[None]:
        yield from run.until(STEPS + 1)  # rows that never come
        assert not any(run.codes), f"it ended with {run.codes}: {run.said()}"
        steps = [int(row["step"]) for row in run.rows()]
        assert steps == list(range(STEPS)), f"steps lost or repeated: {steps}"
        self.losses[name] = [row["train/loss"] for row in run.rows()]

    def chosen(self, found: dict[str, Iterator[None]], parts: Sequence[str]) -> dict[str, Iterator[None]]:
        """Of `runs` or `kills` those whose names have one of these parts in them, and what they are compared with."""
        names = {name for name in self.like if any(part in name for part in parts)}
        self.like = {name: like for name, like in self.like.items() if name in names}
        names |= {like for like, _ in self.like.values()}
        return {name: task for name, task in found.items() if name in names}

    def told(self, failed: dict[str, str]) -> list[dict[str, object]]:
        """A row for each: the largest difference of a loss, relative, and the most that it may be."""
        found = []
        for name, (other, most) in self.like.items():
            row: dict[str, object] = {"name": name, "like": other, "most": most, "difference": None, "reason": ""}
            if name in self.losses and other in self.losses:
                pairs = zip(self.losses[name], self.losses[other], strict=True)
                row["difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
            else:
                which = name if name in failed else other
                row["reason"] = ", ".join(x for x in (failed.get(which), self.stuck.get(which)) if x) or "not run"
            found.append(row)
        return found
