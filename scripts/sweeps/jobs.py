"""The jobs of a sweep: that of an experiment's file, with the words of a command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from conf import schema, settings
from conf.command import sentence
from conf.folders import job_folder, runs, setting
from scripts.array_job import CONF, jobs

NOT_OF_A_SWEEP = {
    "run_dir": "each job of a sweep has a folder of its own",
    "dry_run": "a job has a result once it has trained, and `python train.py -m` tells what each would take",
    "experiment": "a sweep is named without `experiment=`, as the first word",
}


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


def settings_of(words: Iterable[str]) -> dict[str, str]:
    """Of the words of a job; the last that names a setting counts, and one that takes a setting away (~logger) has no
    value."""
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def name_of(words: Iterable[str], name: str) -> str:
    """The run's name by its words, or else this one, the experiment's."""
    return [name, *(word.partition("=")[2] for word in words if word.startswith("name="))][-1]


def sweep(experiment: str, words: list[str]) -> list[Job]:
    """The jobs. Raises ValueError where there is no such experiment, or a word is wrong: what train.py says at once."""
    first, (name, over) = f"experiment={experiment}", params(experiment)
    typed = {word.partition("=")[0]: word for word in words}
    for word in words:
        if why := NOT_OF_A_SWEEP.get(setting(word)):
            raise ValueError(f"{word}: {why}; leave it out")
    swept = [typed.get(key, f"{key}={value}") for key, value in over.items()]
    words = [*swept, *(word for word in words if word not in swept)]  # each in the place that it has in the sweep
    every = [Job(name_of(words, name), (first, *job)) for job in jobs(words)]
    found = list({job.key: job for job in reversed(every)}.values())[::-1]  # what is named twice is one job
    models = dict.fromkeys(word.partition("=")[2] for job in found for word in job.words if word.startswith("model="))
    searched = [CONF, *(Path(folder) for word in words for folder in re.findall(r"file://([^,\]]+)", word))]
    for model in models:
        if not any((folder / "model" / f"{model}.yaml").exists() for folder in searched):
            raise ValueError(f"model={model} is not there; python train.py --help lists them")
    for job in some_with_all(found, set(typed)):
        if wrong := mistakes(job, set(typed)):
            raise ValueError("\n       ".join(wrong))
    return found


def some_with_all(every: list[Job], typed: set[str]) -> Iterator[Job]:
    """Jobs that together have each value of these settings, since composing takes a sixth of a second. A setting of the
    model is tried with each model.
    """
    asked = typed | {"model"} if any("model." in key for key in typed) else typed - {"model"}
    seen: set[str] = set()
    for job in every:
        words = {word for word in job.words if word.partition("=")[0] in asked}
        if not words <= seen:
            seen |= words
            yield job


def mistakes(job: Job, typed: set[str]) -> list[str]:
    """What train.py would say of it before it imports torch."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*job.words, "run_dir=none"])
    except HydraException as error:
        return [sentence(error, [word for word in job.words if word.partition("=")[0] in typed])]
    return settings.mistakes(OmegaConf.to_container(cfg))
