"""Where runs live, what they are called, and that none is left by a config that is refused."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# What the same run may change when it goes on: where it runs and what it shows, not what it computes. (Losses then
# agree to rounding.)
FREE_TO_CHANGE = (
    "trainer",
    "logger",
    "callbacks",
    "micro_batch",
    "context_parallel",
    "num_workers",
    "log_every",
    "overwrite",
    "run_dir",
    "compile",
    "recompute",
    "cuda_graph",
    "guard",
    "dry_run",
    "mirror",
    "keep",
)

LONGEST = 128  # characters of a run's name for wandb, and of a job's folder; file systems take 255 bytes


def refuse(run_dir: str, sentences: Iterable[str]) -> NoReturn:
    """Ends the process with what is wrong, and takes the run's folder away, which Hydra made, if nothing is in it."""
    with suppress(OSError):
        os.rmdir(run_dir)
    sys.exit("error: " + "\n       ".join(sentences))


def leave_none(run_dir: str) -> None:
    """Takes a run's folder away, which Hydra made, and that of its sweep, where nothing is in them."""
    root, folder = Path(runs()).absolute(), Path(run_dir).absolute()
    with suppress(OSError):
        folder.rmdir()
        for parent in folder.parents:
            if parent == root or not parent.is_relative_to(root):
                break
            parent.rmdir()


def runs() -> str:
    """The folder of all runs: RUNS, in which ~ is the home folder."""
    return os.path.expanduser(os.environ.get("RUNS") or "runs")


def run_id(run_dir: str) -> str:
    """The run's directory below runs/ as a name without slashes: unique, and the same when the run goes on."""
    root = Path(runs()).absolute()
    path = Path(run_dir).absolute()
    parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts[-2:]
    exact = "-".join(parts)
    return _shortened(re.sub(r"[^A-Za-z0-9_.-]+", "-", exact), exact)


def sweep_of(run_dir: str, name: str) -> str | None:
    """The name of the sweep of which a folder is a job, None for a run by itself."""
    return name if _within(run_dir, name) else None


def label(run_dir: str, name: str) -> str:
    """What a run is called among others: a job by its overrides, which are its folder; a run by itself by its name."""
    inside = _within(run_dir, name)
    return name if inside is None else inside


def _within(run_dir: str, name: str) -> str | None:
    """The folder below that of the run's name; None where the run is in that itself, or elsewhere."""
    path, parent = Path(run_dir).absolute(), Path(runs(), name).absolute()
    return path.relative_to(parent).as_posix() if path != parent and path.is_relative_to(parent) else None


def job_folder(name: str, overrides: Sequence[str]) -> str:
    """The folder of a sweep's job below runs/NAME: the words of its command line in alphabetical order, without those
    that change no result (FREE_TO_CHANGE). Where a file system or a shell would not take them as they are, keys lose
    all but their last part, then the end is cut off, and a hash of the whole marks the name.
    """
    words = sorted(word for word in overrides if setting(word) != "name")
    before = ",".join(words)  # how folders were named once: a sweep of that time goes on in them
    if os.path.isfile(Path(runs(), name, before, "config.yaml")):
        return before
    exact = ",".join(word for word in words if setting(word) not in (*FREE_TO_CHANGE, "strategy"))
    readable = re.sub(r"[^A-Za-z0-9_.,=+~@:{}\[\]-]+", "-", exact)
    if len(exact) > LONGEST:
        readable = re.sub(r"(^|,)[^=,]*\.(?=\w+=)", r"\1", readable)
    return readable if readable == exact and len(exact) <= LONGEST else _shortened(readable, exact, marked=True)


def setting(word: str) -> str:
    """What a word like +trainer.devices=2 or logger@x=wandb sets, up to the first dot."""
    return re.split(r"[.=@/]", word.lstrip("+~"))[0]


def _shortened(readable: str, exact: str, marked: bool = False) -> str:
    """`readable`, cut to LONGEST characters where it is longer, with the beginning of SHA-256 of `exact` at its end."""
    if len(readable) <= LONGEST and not marked:
        return readable
    mark = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{readable[: LONGEST - 9].rstrip('.,-')}-{mark}"
