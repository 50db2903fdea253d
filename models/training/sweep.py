"""A sweep: `python train.py -m seed=1,2,3`. Hydra's launcher calls train.py's main for one job after another, in one
process. Here each job is made to be what it would be by itself, and one that fails is told at the end, while the others
run.

What a process keeps from one job to the next, and what is done about it: variables of the environment and words of the
command line, by which Lightning starts other ranks (put back); the process group (ended); compiled code, of which torch
keeps eight versions a function (forgotten); memory of the GPU and its peak (freed, counted anew). Loggers, locks and
threads end with their run: models/training/finish.py.

A launcher such as submitit's takes each job to a process of its own, perhaps on another machine. It pickles the Sweep,
and what happens there is told in files, since all that Hydra brings back of a job that failed is an exception.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import open_dict, read_write

from conf import schema
from conf.folders import runs
from models.training.run import describe

ROOT = Path(__file__).parents[2]
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
        self.told: Path | None = None  # the folder in which the others tell theirs, if there are any
        self.script = ""

    def __getstate__(self) -> dict[str, Any]:
        """For a launcher that takes it elsewhere. The process there must find this repository and the folder."""
        self.told = self.told or Path(runs()).absolute() / f".sweep-{uuid4().hex}"
        self.told.mkdir(parents=True, exist_ok=True)
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if str(ROOT) not in paths:
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *paths]))
        return vars(self) | {"process": 0, "outcomes": [], "script": sys.argv[0]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Elsewhere. Hydra brings its config along, but not the resolvers; and Lightning starts other ranks, and
        origin.py tells the command, by what this process would have been started with.
        """
        vars(self).update(state)
        schema.register()
        sys.argv = [self.script]
        sys.modules["__main__"].__spec__ = None

    def reported(self, main: Callable[[], Any]) -> Callable[[], Any]:
        """At the end of a sweep a line for each job, then the failures once more. The exit code is 1 if there are
        any."""

        @functools.wraps(main)
        def wrapped() -> None:
            self.process, self.outcomes, self.told = os.getpid(), [], None
            try:
                ended = self._end_of(main)
                self.outcomes += self._heard()
            finally:
                if self.told:
                    shutil.rmtree(self.told, ignore_errors=True)
            if not self.outcomes:
                if ended:
                    raise ended
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
            if isinstance(ended, Exception):
                traceback.print_exception(ended)
            if ended:
                say(f"\nthe sweep itself ended early, and does not wait for jobs that still run: {_reason(ended)}")
            if failed or ended:
                sys.exit(1)

        return wrapped

    def _end_of(self, main: Callable[[], Any]) -> SystemExit | Exception | None:
        """What ended the sweep before its jobs: a launcher's job that was killed, a sweeper that has nothing to choose
        from. To be asked to stop is raised.
        """
        try:
            main()
        except SystemExit as stop:
            if not isinstance(stop.code, str):
                raise
            return stop
        except Exception as error:
            return error
        return None

    def job(self, task: Callable[[Any], Result]) -> Callable[[Any], float | None]:
        """Runs one job. A mistake in its settings, an exception and a lack of memory end the job and not the sweep;
        being asked to stop ends the sweep. Returns the validation loss in nats per token, which is what a sweeper like
        Optuna minimises; None where there is none or it is not finite, which makes Optuna's trial a failed one. Raises
        JobError in another process from which it can't be told otherwise.
        """

        @functools.wraps(task)
        def wrapped(cfg: Any) -> float | None:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                task(cfg)
                return None
            folder = Path(HydraConfig.get().runtime.output_dir)
            result: Result = None
            self.dry = cfg.dry_run
            words = list(HydraConfig.get().overrides.task)
            if not (failure := self._twice(folder, words)):
                with alone():
                    result, failure = _attempt(task, cfg)
            outcome = Outcome(words, folder, failure or describe(result or {}), bool(failure))
            if self.process == os.getpid():
                self.outcomes.append(outcome)
            else:
                self._tell(outcome)
            if (module := sys.modules.get("models.training.preemption")) and module.Preemption.asked:
                raise module.stop_of_a_sweep()
            loss = (result or {}).get("validation/nats")
            return loss if not failure and loss is not None and math.isfinite(loss) else None

        return wrapped

    def _tell(self, outcome: Outcome) -> None:
        """The process that began the sweep, from another one, by a file for each job."""
        from models.training.summary import rank_zero_only

        if rank_zero_only.rank:
            return
        if self.told is None or not self.told.is_dir():  # it has ended, or the folder is not shared
            if outcome.failed:
                raise JobError(outcome.says)
            return
        path = self.told / f"{HydraConfig.get().job.num}.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({**outcome._asdict(), "folder": str(outcome.folder.absolute())}))
        draft.replace(path)

    def _heard(self) -> Iterator[Outcome]:
        """What other processes have told, in the order of the jobs."""
        for path in sorted(self.told.glob("*.json"), key=lambda path: int(path.stem)) if self.told else ():
            told = json.loads(path.read_text())
            yield Outcome(**told | {"folder": Path(told["folder"])})

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

    def _twice(self, folder: Path, words: list[str]) -> str:
        """Why it is no job of its own. A sweeper that chooses may choose the same again, and gets the same result."""
        typed = HydraConfig.get().runtime.choices.get("hydra/sweeper") == "basic"
        if not any(outcome.folder == folder and (typed or outcome.words != words) for outcome in self.outcomes):
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
        return None, _reason(error)


def _reason(error: SystemExit | Exception) -> str:
    """In a line."""
    if isinstance(error, SystemExit):
        return str(error.code).removeprefix("error: ")
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


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
