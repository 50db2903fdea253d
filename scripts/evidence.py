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
import math
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conf.command import said
from scripts.sweeps.jobs import sweep
from scripts.sweeps.processes import UNFINISHED, run
from scripts.sweeps.rates import fewer, with_rates
from scripts.sweeps.results import Results, Shared, left, results_of


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
            rated = Results(source).read()
            every, unknown = with_rates(every, rated, given.times)
            if few := fewer(rated):
                told = ", ".join(f"{model} ({count})" for model, count in few.items())
                print(f"run at fewer rates than others in --rates={given.rates}: {told}", flush=True)
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
