"""One job of a sweep, chosen by its number, so that a Slurm job array is a sweep:

    python scripts/array_job.py name=ablation model=softmax,mesa seed=1,2,3     # its jobs, and the next line
    sbatch --array=0-5 scripts/slurm/array.sbatch name=ablation model=softmax,mesa seed=1,2,3

Within an array, where SLURM_ARRAY_TASK_ID says which, it is `train.py -m` with the words of that job, whose folder is
then the one that `train.py -m` with all of them would give it.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # which `train.py -m` uses
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from conf.command import of_one_run

CONF = Path(__file__).resolve().parent.parent / "conf"
TASK = "SLURM_ARRAY_TASK_ID"


def jobs(words: list[str]) -> list[list[str]]:
    """The words of each job, in the order in which `train.py -m` runs them. Raises ValueError for a word that can't be
    read."""
    if flags := [word for word in words if word.startswith("-")]:
        raise ValueError(f"{flags[0]} is a flag: an array takes settings alone")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):  # for glob(...), which asks what there is
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            (found,) = BasicSweeper.split_arguments(parser.parse_overrides(words), None)
    except HydraException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return [list(job) for job in found]


def chosen(words: list[str], task: str) -> list[str]:
    """Those of job number `task`. Raises ValueError where the sweep has no such job."""
    each = jobs(words)
    if not task.isdecimal() or int(task) >= len(each):
        last = len(each) - 1
        raise ValueError(f"{TASK}={task} is no job of this sweep, which has {len(each)}: sbatch --array=0-{last}")
    return each[int(task)]


def main() -> None:
    words = sys.argv[1:]
    try:
        if mistake := of_one_run(["-m", *words]):
            raise ValueError(mistake)
        if (task := os.environ.get(TASK)) is None:
            each = jobs(words)
            print("\n".join(f"{i}  {shlex.join(job)}" for i, job in enumerate(each)))
            print(f"\nsbatch --array=0-{len(each) - 1} scripts/slurm/array.sbatch {shlex.join(words)}")
            return
        job = chosen(words, task)
    except ValueError as error:
        sys.exit(f"error: {error}")
    import train

    sys.argv = [str(train.__file__), "-m", *job]
    train.main()


if __name__ == "__main__":
    main()
