"""The jobs of experiments' sweeps, some at a time on one device, within a time. The next call goes on where it ended.

    python scripts/evidence.py mqar --jobs                           # the jobs, and which of them have a result
    python scripts/evidence.py mqar --at-once 8 --minutes 20         # runs them; the same line again goes on
    python scripts/evidence.py mqar --at-once 8 seed=1,2,3 optimizer.lr=1e-3,3.2e-3     # other points of the sweep
    python scripts/evidence.py ablation --rates ablation_rates --times 0.75          # each mixer's best rate there
    python scripts/evidence.py needles regression --at-once 12 --minutes 9           # two sweeps, one job after another

Small models leave most of a GPU idle: several of them, each in a process of its own, share it. Where there are several
GPUs, each process sees one of them. The sweep is that of conf/experiment/NAME.yaml (hydra.sweeper.params); words behind
the name replace or add settings, as with `train.py -m`, which has the same jobs in the same folders. A job that is not
finished when the time is up is asked to save, and goes on with the next call. A result is a line of
docs/evidence/NAME/results.jsonl: the job, its words, the command, the commit, the device, the seconds, the validation.
A job that has a line there is done, whatever is left of its folder; so this file is all that has to travel between
machines. What ended in an error has a line in failures.jsonl beside it, until it has a result.
scripts/figures/evidence.py draws from both. Models of a package of your own are found by
"hydra.searchpath=[file:///your/conf]" and TTR_PACKAGES, as by train.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from conf import schema
from conf.command import said, sentence
from conf.folders import job_folder, runs
from models.training import origin
from scripts.array_job import CONF, jobs
from scripts.benchmarks.apart import reason

ROOT = CONF.parent
UNFINISHED = 75  # the exit code of a run that saved (models/training/preemption.py)
GRACE = 120.0  # seconds that a run has to save


class Job(NamedTuple):
    """words: of its command line, the experiment's first."""

    name: str
    words: tuple[str, ...]

    @property
    def experiment(self) -> str:
        return self.words[0].partition("=")[2]

    @property
    def folder(self) -> Path:
        return Path(runs(), self.name, job_folder(self.name, [w for w in self.words if not w.startswith("hydra.")]))

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def command(self) -> list[str]:
        return [sys.executable, "train.py", *self.words, f"hydra.run.dir='{self.folder.absolute()}'"]

    @property
    def key(self) -> str:
        """What it is known by: its folder, whose name has no settings that change no result."""
        return f"{self.name}/{self.folder.name}"

    @property
    def label(self) -> str:
        """Two sweeps may be over the same settings."""
        return " ".join([self.experiment, *(word for word in self.words[1:] if not word.startswith("hydra."))])


Slot = dict[str, str]  # what is another in a process's environment: the GPU that it sees


class Running(NamedTuple):
    """A job's process, when it began, in seconds of time.time(), and where."""

    job: Job
    process: subprocess.Popen[bytes]
    began: float
    slot: Slot


@cache
def composed(experiment: str) -> DictConfig:
    """Its config, Hydra's own among it. Raises ValueError where there is no such experiment with a sweep."""
    known = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if "sweeper:" in path.read_text())
    if experiment not in known:
        there = (CONF / "experiment" / f"{experiment}.yaml").exists()
        why = "has no sweep" if there else "is not there"
        raise ValueError(f"experiment={experiment} {why}; there are {', '.join(known)}")
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"experiment={experiment}", "run_dir=none"], return_hydra_config=True)


def params(experiment: str) -> tuple[str, dict[str, Any]]:
    """Its name, and what its sweep is over."""
    cfg = composed(experiment)
    return cfg.name, dict(cfg.hydra.sweeper.params)


def sweep(experiment: str, words: list[str]) -> list[Job]:
    """The jobs. Raises ValueError where there is no such experiment, or a word is wrong: those of the first job are
    composed.
    """
    first, (name, over) = f"experiment={experiment}", params(experiment)
    typed = {word.partition("=")[0]: word for word in words}
    swept = [typed.get(key, f"{key}={value}") for key, value in over.items()]
    words = [*swept, *(word for word in words if word not in swept)]  # each in the place that it has in the sweep
    names = [word.partition("=")[2] for word in words if word.startswith("name=")]
    found = [Job(names[-1] if names else name, (first, *job)) for job in jobs(words)]
    models = dict.fromkeys(word.partition("=")[2] for job in found for word in job.words if word.startswith("model="))
    searched = [CONF, *(Path(folder) for word in words for folder in re.findall(r"file://([^,\]]+)", word))]
    for model in models:
        if not any((folder / "model" / f"{model}.yaml").exists() for folder in searched):
            raise ValueError(f"model={model} is not there; python train.py --help lists them")
    mine = [w for w in found[0].words if w.partition("=")[0] in typed and not w.startswith("model.")]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("train", [first, *mine, "run_dir=none"])
    except HydraException as error:
        raise ValueError(sentence(error, mine)) from None
    return found


class Results:
    """A file with a line for each job that has a result. commit: of this repository, where no git says it."""

    def __init__(self, path: Path, commit: str | None = None) -> None:
        self.path, self.commit = path, commit

    def read(self) -> list[dict[str, Any]]:
        return lines(self.path)

    def have(self) -> set[str]:
        return {row["job"] for row in self.read()}

    def add(self, job: Job) -> dict[str, Any]:
        result = json.loads((job.folder / "result.json").read_text())
        row = {"job": job.key, "words": list(job.words), "date": datetime.now(UTC).date().isoformat(), **result}
        row["command"] = shlex.join(["python", "train.py", "-m", *job.words])
        row["commit"] = row.get("commit") or self.commit
        write(self.path, [*self.read(), row])
        if others := self.failures():
            write(self._failed, [each for each in others if each["job"] != job.key])
        return row

    @property
    def _failed(self) -> Path:
        return self.path.with_name("failures.jsonl")

    def failures(self) -> list[dict[str, Any]]:
        """Of jobs that ended in an error the last time, and why."""
        return lines(self._failed)

    def fail(self, job: Job, reason: str) -> None:
        row = {"job": job.key, "words": list(job.words), "date": datetime.now(UTC).date().isoformat()}
        others = [each for each in self.failures() if each["job"] != job.key]
        write(
            self._failed, [*others, {**row, "commit": self.commit or origin.commit()["commit"], "reason": reason[:300]}]
        )


class Shared:
    """Those of several experiments, each with a file of its own."""

    def __init__(self, of: dict[str, Results]) -> None:
        self.of = of

    def have(self) -> set[str]:
        return {key for each in self.of.values() for key in each.have()}

    def add(self, job: Job) -> dict[str, Any]:
        return self.of[job.experiment].add(job)

    def fail(self, job: Job, reason: str) -> None:
        self.of[job.experiment].fail(job, reason)


def lines(path: Path) -> list[dict[str, Any]]:
    """A line that a kill has cut off is left out."""
    text = path.read_text() if path.exists() else ""
    found = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not the line of a result ({error.msg})") from None
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.replace(path)


def with_rates(every: list[Job], found: list[dict[str, Any]], times: float) -> tuple[list[Job], list[str]]:
    """The jobs, each at the rate that was best for its mixer among these results, by the mean over seeds of the last
    validation loss, times this; and the mixers that have no result, whose jobs are left out. Raises ValueError where
    none has one, a result no rate, or a job one already.
    """
    losses: dict[str, dict[float, list[float]]] = {}
    for row in found:
        words = dict(word.split("=", 1) for word in row["words"])
        if not {"model", "optimizer.lr"} <= words.keys():
            raise ValueError(f"--rates: {row['job']} has no optimizer.lr; they are of a sweep over mixers and rates")
        of_rate = losses.setdefault(words["model"], {}).setdefault(float(words["optimizer.lr"]), [])
        of_rate.append(row["validation/nats"] if math.isfinite(row["validation/nats"]) else math.inf)

    def model_of(job: Job) -> str:
        return dict(word.split("=", 1) for word in job.words)["model"]

    def rated(job: Job) -> Job:
        model = model_of(job)
        if any(word.startswith("optimizer.lr=") for word in job.words):
            raise ValueError(f"--rates: {job.label} has a rate already; leave optimizer.lr out, or --rates")
        best = min(losses[model], key=lambda rate: sum(losses[model][rate]) / len(losses[model][rate]))
        if math.isinf(sum(losses[model][best])):
            raise ValueError(f"--rates: model={model} has diverged at each of its rates; try a lower one")
        return Job(job.name, (*job.words, f"optimizer.lr={best * times:.4g}"))

    unknown = [model for model in dict.fromkeys(map(model_of, every)) if model not in losses]
    if len(unknown) == len(set(map(model_of, every))):
        raise ValueError(
            f"--rates has no result of model={','.join(unknown)}; it has {', '.join(sorted(losses)) or 'no results'}"
        )
    return [rated(job) for job in every if model_of(job) in losses], unknown


def results_of(experiment: str) -> Path:
    return ROOT / "docs" / "evidence" / experiment / "results.jsonl"


def left(every: Iterable[Job], results: Results | Shared) -> Iterator[Job]:
    """Jobs without a result. One that ended when nobody was there to write it down gets its line now."""
    done = results.have()
    for job in every:
        if job.key in done:
            continue
        if (job.folder / "result.json").exists():
            results.add(job)
        else:
            yield job


def slots(at_once: int) -> list[Slot]:
    """For as many processes: each sees one of the GPUs, in turn. One alone sees them all."""
    if at_once == 1:
        return [{}]
    import torch  # two seconds that --jobs need not pay

    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = [{"CUDA_VISIBLE_DEVICES": each} for each in seen.split(",")] if seen else [{}]
    return [gpus[i % len(gpus)] for i in range(at_once)]


def run(todo: list[Job], results: Results | Shared, at_once: int, until: float) -> list[Job]:
    """Runs them, in order, so many at a time, until then. Returns those that failed, not those that only ran out of
    time."""
    waiting, failed, free = list(todo), [], slots(at_once)
    running: list[Running] = []
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    # torch.compile, which deep memories use, would start as many processes as there are cores, for each job
    few = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    try:
        while waiting or running:
            while waiting and free and time.time() < until:
                running.append(start(waiting.pop(0), free.pop(0), few | os.environ))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.slot)
                failed += [one.job] if ended(one, results) else []
            if time.time() >= until:
                break
            time.sleep(0.2)
    finally:
        failed += [one.job for one in stop(running) if ended(one, results)]
    return failed


def start(job: Job, slot: Slot, environment: dict[str, str]) -> Running:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        out: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(job.command, cwd=ROOT, env=environment | slot, start_new_session=True, **out)
    return Running(job, process, time.time(), slot)


def ended(one: Running, results: Results | Shared) -> bool:
    """Says how. Whether it failed."""
    seconds = f"{time.time() - one.began:6.0f} s"
    if (one.job.folder / "result.json").exists():
        row = results.add(one.job)
        print(f"{seconds}  {one.job.label}   {summary(row)}", flush=True)
        return False
    if one.process.returncode in (UNFINISHED, -signal.SIGTERM):  # the latter before it had anything to save
        print(f"{seconds}  {one.job.label}   goes on next time", flush=True)
        return False
    why = reason(one.process.returncode, one.job.log.read_text(errors="replace"))
    results.fail(one.job, why)
    print(f"{seconds}  {one.job.label}   FAILED: {why}", flush=True)
    print(f"          {one.job.log}", flush=True)
    return True


def stop(running: list[Running]) -> list[Running]:
    """Asks all to save, and waits."""
    for one in running:
        one.process.send_signal(signal.SIGTERM)
    until = time.time() + GRACE
    for one in running:
        try:
            one.process.wait(max(0.1, until - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
    return running


def summary(row: dict[str, Any]) -> str:
    points = [x for name, x in row.items() if name.startswith("validation/accuracy_on/") and name.count("/") == 2]
    parts = [f"accuracy {row['validation/accuracy']:.3f}"] if "validation/accuracy" in row else []
    parts += [f"at test points {' '.join(f'{x:.2f}' for x in points)}"] if points else []
    parts += [f"{row['validation/bits_per_byte']:.4f} bits per byte"] if "validation/bits_per_byte" in row else []
    return ", ".join(parts or [f"{row['validation/nats']:.4f} nats per token"])


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words", nargs="+", metavar="EXPERIMENT [SETTING=VALUE]", help="files of conf/experiment; as for train.py -m"
    )
    parser.add_argument("--at-once", type=int, default=1, help="processes at a time, on all GPUs (default: 1)")
    parser.add_argument("--minutes", type=float, help="after which runs are asked to save (default: no limit)")
    parser.add_argument("--results", type=Path, help="(default: docs/evidence/EXPERIMENT/results.jsonl)")
    parser.add_argument("--rates", metavar="EXPERIMENT", help="whose results say which rate is best; or such a file")
    parser.add_argument("--times", type=float, default=1.0, help="by which that rate is multiplied (default: 1)")
    parser.add_argument("--commit", help="of these files, where they are a copy without git")
    parser.add_argument("--jobs", action="store_true", help="print the jobs, and run none")
    given = parser.parse_intermixed_args(words)
    settings = [word for word in given.words if "=" in word or word.startswith("~")]
    given.experiments = list(dict.fromkeys(word for word in given.words if word not in settings))
    given.words = settings
    if not given.experiments:
        parser.error("no EXPERIMENT is named, a file of conf/experiment")
    if given.results is not None and len(given.experiments) > 1:
        parser.error(f"--results {given.results} is a file for one experiment, not for {' '.join(given.experiments)}")
    if given.at_once < 1:
        parser.error(f"--at-once {given.at_once} must be at least 1")
    if not 0 < given.times < math.inf or (given.times != 1 and not given.rates):
        parser.error(f"--times {given.times:g} must be positive, and multiplies the rates of --rates")
    if given.minutes is not None and not 0 < given.minutes < math.inf:
        parser.error(f"--minutes {given.minutes:g} must be positive")
    if given.results is not None and Path(given.results).is_dir():
        parser.error(f"--results {given.results} is a folder; name a file in it")
    return given


def main() -> None:
    given = arguments()
    of = {name: Results(given.results or results_of(name), given.commit) for name in given.experiments}
    results = Shared(of)
    try:
        every, done = [job for name in of for job in sweep(name, given.words)], results.have()
        if given.rates:
            source = Path(given.rates) if given.rates.endswith(".jsonl") else results_of(given.rates)
            if not source.exists():
                raise ValueError(
                    f"--rates={given.rates}: there is no {source}; it is an experiment with results, or a file"
                )
            every, unknown = with_rates(every, Results(source).read(), given.times)
            if unknown:
                print(
                    f"left out, as --rates={given.rates} has no result of them: model={','.join(unknown)}", flush=True
                )
    except ValueError as error:
        sys.exit(f"error: {error}")
    if given.jobs:
        return said("\n".join(f"{'done' if job.key in done else '    '}  {job.label}" for job in every))
    todo = list(left(every, results))
    where = ", ".join(str(each.path) for each in of.values())
    print(f"{len(every)} jobs, {len(every) - len(todo)} have a result; results are in {where}", flush=True)
    until = time.time() + given.minutes * 60 if given.minutes else float("inf")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(UNFINISHED))  # the runs are asked to save, as at the end of time
    failed = run(todo, results, given.at_once, until)
    rest = len(list(left(every, results)))
    print(f"{len(every) - rest} of {len(every)} jobs have a result, {len(failed)} failed")
    sys.exit(1 if failed else UNFINISHED if rest else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same line again goes on")
