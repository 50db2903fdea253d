"""The mean of the weights of several checkpoints of a run, as a model of its own:

    python scripts/average.py runs/NAME --last 5                  # of the five newest, each counts the same
    python scripts/average.py runs/NAME --steps 400 500 600       # of these
    python scripts/average.py runs/NAME --last 5 --decay 0.8      # an older one counts 0.8 of the next newer one

    w = sum_i a_i w_i ,   a_i = d^(n - i) / sum_j d^(n - j) ,   i = 1 ... n from the oldest on, d = 1 without --decay

A mean of weights on a plateau of the learning rate is about as good as a decayed model (Kaddour 2022; Sanyal et al.
2023, "Early weight averaging meets high learning rates"). d < 1 is the exponential moving average. Sums are in float64.

It is written to runs/NAME/model-NAME, which evaluate.py, generate.py, export.py, init_from= and transformers take.
docs/runs.md says which checkpoints stay.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from models.language_model import LanguageModel, LanguageModelConfig
from models.training import origin
from models.training.checkpoint import step_of, what_is_wrong
from models.training.summary import quiet, say
from models.training.weights import open_trained, read


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, finished or not")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, metavar="N", help="so many of the newest checkpoints")
    which.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="the checkpoints of these steps")
    parser.add_argument("--decay", type=float, default=1.0, help="what an older one counts of the next newer one (1)")
    parser.add_argument("--name", help="of the folder, behind model- (default: last-N, or the steps)")
    given = parser.parse_args(words)
    if given.name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", given.name):
        parser.error(f"--name {given.name} must be letters, digits, '-', '_' and '.', since a folder is called by it")
    if not 0 < given.decay <= 1:
        parser.error(f"--decay {given.decay} must be above 0 and at most 1")
    return given


def main(words: list[str] | None = None) -> None:
    given = arguments(words)
    quiet()
    try:
        paths = chosen(given.run.expanduser(), given.last, given.steps)
        folder = average(given.run.expanduser(), paths, given.decay, given.name or default_name(given, paths))
    except ValueError as error:
        sys.exit(f"error: {error}")
    say(f"averaged  {folder}: of {len(paths)} checkpoints, {', '.join(f'step {step_of(path):,}' for path in paths)}")


def default_name(given: argparse.Namespace, paths: Sequence[Path]) -> str:
    which = f"last-{given.last}" if given.last else "-".join(str(step_of(path)) for path in paths)
    return which if given.decay == 1 else f"{which}-decay-{given.decay:g}"


def chosen(run: Path, last: int | None, steps: Sequence[int] | None) -> list[Path]:
    """Checkpoints of the run, the oldest first. Raises ValueError where one isn't there or is torn."""
    there = {step_of(path): path for path in sorted((run / "checkpoints").glob("step-[0-9]*.ckpt"))}
    known = ", ".join(map(str, there)) or "none"
    if last is not None and not 2 <= last <= len(there):
        raise ValueError(f"--last {last} must be from 2 to {len(there)}: {run} has the checkpoints {known}")
    wanted = sorted(set(steps or [])) if last is None else list(there)[-last:]
    if absent := [step for step in wanted if step not in there]:
        raise ValueError(f"--steps {absent[0]} is no checkpoint of {run}; there are {known}. keep= makes more stay")
    if len(wanted) < 2:
        raise ValueError(f"--steps {wanted[0]} is one checkpoint; a mean needs two")
    for step in wanted:
        if wrong := what_is_wrong(there[step]):
            raise ValueError(f"{there[step]} is torn: {wrong}")
    return [there[step] for step in wanted]


def mean(paths: Sequence[Path], decay: float = 1.0) -> dict[str, Tensor]:
    """Of the weights of these checkpoints, the oldest first, each read once. What is no floating-point number, which
    has no mean, is the newest's.
    """
    shares = [decay ** (len(paths) - i) for i in range(1, len(paths) + 1)]
    sums: dict[str, Tensor] = {}
    for path, share in zip(paths, shares, strict=True):
        for name, value in read(path).items():
            if not value.is_floating_point():
                sums[name] = value
            elif name in sums:
                sums[name].add_(value.double(), alpha=share)
            else:
                sums[name] = value.double() * share
    return {name: (x / sum(shares)).float() if x.is_floating_point() else x for name, x in sums.items()}


def average(run: Path, paths: Sequence[Path], decay: float, name: str) -> Path:
    """Writes run/model-NAME with result-NAME.json beside it, and returns the folder. Raises ValueError where something
    of that name is there.
    """
    folder, result = run / f"model-{name}", run / f"result-{name}.json"
    if folder.exists() or result.exists():
        raise ValueError(f"{folder} is there already; choose another --name, or remove it and {result.name}")
    newest = open_trained(paths[-1])
    assert newest.config is not None  # a checkpoint's
    tokenizer = newest.tokenizer()
    special: dict[str, Any] = {} if tokenizer is None else tokenizer.special_ids
    size = newest.model.config.vocab_size
    model = LanguageModel(LanguageModelConfig(vocab_size=size, **special, **newest.config["model"]))
    model.load_state_dict(mean(paths, decay))
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    if tokenizer is not None:
        tokenizer.save(draft)
    steps = [step_of(path) for path in paths]
    said = {"tokens": steps[-1] * newest.config["batch_tokens"], "averaged": steps, "decay": decay}
    result.write_text(json.dumps(said | origin.origin(torch.device("cpu")), indent=2) + "\n")
    draft.rename(folder)
    return folder


if __name__ == "__main__":
    main()
