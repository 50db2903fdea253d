"""A sweep: `python train.py -m seed=1,2,3`. Hydra's launcher calls train.py's main for one job after another, in one
process. Here each job is made to be what it would be by itself, and one that fails is told at the end, while the others
run.

What a process keeps from one job to the next, and what is done about it: variables of the environment and words of the
command line, by which Lightning starts other ranks (put back); the process group (ended); compiled code, of which torch
keeps eight versions a function (forgotten); memory of the GPU and its peak (freed, counted anew). Loggers, locks and
threads end with their run: models/training/finish.py.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import open_dict, read_write

from models.training.run import describe

Result = dict[str, Any] | None  # of a run, None on a rank that does not write it


class JobError(RuntimeError):
    """Why a job of a sweep failed, without the traceback, which would keep the job's tensors alive."""


class Outcome(NamedTuple):
    """How a job ended: its words, its folder, and its result in a line, or why there is none."""

    words: list[str]
    folder: Path
    says: str
    failed: bool


class Sweep:
    """The two decorators of train.py's main, around Hydra's: `@sweep.reported @hydra.main(...) @sweep.job`.

    page: writes what compares the jobs, and returns what to say of it. One that fails is a warning.
    """

    def __init__(self, page: Callable[[list[Outcome]], str] = lambda outcomes: "") -> None:
        self.page = page
        self.process = 0  # that in which the outcomes are collected; a launcher may start jobs in others
        self.outcomes: list[Outcome] = []
        self.dry = False  # dry_run=true, which leaves nothing to compare

    def reported(self, main: Callable[[], Any]) -> Callable[[], Any]:
        """At the end of a sweep a line for each job, then the failures once more. The exit code is 1 if there are
        any."""

        @functools.wraps(main)
        def wrapped() -> None:
            self.process, self.outcomes = os.getpid(), []
            main()
            if not self.outcomes:
                return
            from models.training.summary import say  # with torch, which the jobs have imported

            failed = [(name, job) for name, job in self._named() if job.failed]
            say(f"\nsweep     {len(self.outcomes)} jobs, {len(failed)} failed")
            say("\n".join(f"  {name}   {'FAILED' if job.failed else job.says}" for name, job in self._named()))
            if not self.dry:
                self._compare()
            if failed:
                say("\nfailed; the same command tries again, and leaves out the jobs that are finished:")
                say("\n".join(f"  {name}   {job.says}\n      {job.folder}" for name, job in failed))
                sys.exit(1)

        return wrapped

    def job(self, task: Callable[[Any], Result]) -> Callable[[Any], float | None]:
        """Runs one job. A mistake in its settings, an exception and a lack of memory end the job and not the sweep;
        being asked to stop ends the sweep. Returns the validation loss in nats per token, which is what a sweeper like
        Optuna minimises. Raises JobError where Hydra's launcher runs jobs in other processes, which report it.
        """

        @functools.wraps(task)
        def wrapped(cfg: Any) -> float | None:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                task(cfg)
                return None
            folder = Path(HydraConfig.get().runtime.output_dir)
            result: Result = None
            self.dry = cfg.dry_run
            if not (failure := self._twice(folder)):
                with alone():
                    result, failure = _attempt(task, cfg)
            words = list(HydraConfig.get().overrides.task)
            self.outcomes.append(Outcome(words, folder, failure or describe(result or {}), bool(failure)))
            if failure and self.process != os.getpid():
                raise JobError(failure)
            return None if failure or not result else result.get("validation/nats")

        return wrapped

    def _compare(self) -> None:
        from models.training.summary import rank_zero_only, say

        @rank_zero_only
        def write() -> None:
            try:
                say(self.page(self.outcomes))
            except Exception as error:
                say(f"warning: there is no page of this sweep: {type(error).__name__}: {error}")

        write()

    def _named(self) -> Iterator[tuple[str, Outcome]]:
        """Each job by the words in which it differs from others."""
        common = set.intersection(*(set(job.words) for job in self.outcomes))
        names = [" ".join(word for word in job.words if word not in common) for job in self.outcomes]
        width = max(len(name) for name in names)
        yield from ((name.ljust(width), job) for name, job in zip(names, self.outcomes, strict=True))

    def _twice(self, folder: Path) -> str:
        if not any(outcome.folder == folder for outcome in self.outcomes):
            return ""
        return (
            "another job of this sweep has the same folder: they differ only in settings that change no result. To "
            "have both, put the setting into the name, like name='speed-${micro_batch}'"
        )


def _attempt(task: Callable[[Any], Result], cfg: Any) -> tuple[Result, str]:
    """The result, and why there is none."""
    try:
        return task(cfg), ""
    except SystemExit as stop:
        if not isinstance(stop.code, str):  # a number: it was asked to stop
            raise
        print(stop.code, flush=True)
        return None, stop.code.removeprefix("error: ")
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        return None, f"{type(error).__name__}: {first}"


@contextmanager
def alone() -> Iterator[None]:
    """A job within it finds, and leaves, the process as if it were the only one."""
    environment, words = dict(os.environ), sys.argv
    sys.argv = [sys.argv[0], *_words_of_the_job()]
    try:
        yield
    finally:
        sys.argv = words
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()  # Lightning's objects refer to each other in circles
        if torch := sys.modules.get("torch"):
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            if compiler := sys.modules.get("torch._dynamo"):
                compiler.reset()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def _words_of_the_job() -> list[str]:
    """The command line that runs this job without the sweep. Lightning's launcher gives it to the other ranks, and adds
    hydra.run.dir.
    """
    config: Any = HydraConfig.instance().cfg
    hydra = config.hydra
    with read_write(hydra), open_dict(hydra):
        hydra.run.dir = hydra.runtime.output_dir
    apart = ("hydra.mode", "hydra.sweep", "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")
    return [*hydra.overrides.task, *(word for word in hydra.overrides.hydra if not word.startswith(apart))]
