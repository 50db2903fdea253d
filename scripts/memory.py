"""What the trained models of an ablation remember of a text; adds it to the lines of results.jsonl.

    python scripts/evidence.py ablation --rates ablation_rates --times 0.75 --minutes 9       # trains them
    python scripts/memory.py ablation                                                         # looks into each

It needs the folders of the runs, so it belongs behind the sweep, on the same machine. For each finished run:

* memory/copied/D: nats a token by which a stretch of the validation text is cheaper for having been shown D tokens
  before, beside the same stretch after another text of the same length. What is lost is forgotten.
* memory/seen, memory/new: nats a token where the pair of a token and its next one has been in the row before, and where
  it has not; only pairs that are rare in training, so that they can hardly be known by heart (Arora et al. 2023,
  section 3). memory/share: of the tokens that are `seen`.
* memory/before/A-B, memory/after/A-B: the inner loss along the sequence, before a pair is written and after, on average
  over layers and heads, as the last validation of the run saw it (regression.jsonl, docs/regression.md).

scripts/figures/evidence.py ablation_memory draws from the lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from conf.folders import runs
from data.text import IGNORE, Text
from models.build import build
from models.training.regression import InnerRegression, read_rows
from models.training.weights import open_trained
from scripts.figures.results import mean
from scripts.sweeps.jobs import Job, name_of, params
from scripts.sweeps.results import Results, change, results_of

STRETCH, KNOWN = 64, 8  # tokens that are shown twice, and of these the first, which say which it is
DISTANCES = (0, 64, 128, 256, 512, 1024, 1856)
RARE, LOOKED_AT = 20, 10_000_000  # times in so many tokens of training, at most
ROWS, AT_ONCE = 64, 16_384  # rows that are looked at, and tokens of a batch


class Asked(NamedTuple):
    """Of the text, [B, T] each: what is read, what comes next, documents; and whether a pair is rare in training, and
    whether it has been there before."""

    ids: Tensor
    labels: Tensor
    segments: Tensor
    rare: np.ndarray
    before: np.ndarray


@torch.no_grad()
def losses(model: Any, rows: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
    """Nats [B, T], 0 where nothing is asked. As it is: to compile what compiles itself would take longer at each of the
    lengths."""
    device = next(model.parameters()).device
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    found, at_once = [], max(1, AT_ONCE // rows.shape[1])
    with half, torch.compiler.set_stance("force_eager"):
        for begin in range(0, len(rows), at_once):
            part = slice(begin, begin + at_once)
            marks = None if segments is None else segments[part].to(device)
            found.append(model.score(rows[part].to(device), labels[part].to(device), marks)[0].float().cpu())
    return torch.cat(found)


def copied(model: Any, text: Tensor, distances: tuple[int, ...] = DISTANCES) -> dict[str, float]:
    """text [B, T]: rows whose beginnings are shown twice, and with whose neighbours the space between is filled."""
    T, others, again = text.shape[1], text.roll(1, 0), text[:, :STRETCH]
    found = {}
    for distance in distances:
        if distance + 2 * STRETCH > T:
            continue
        between = others[:, STRETCH : STRETCH + distance]
        each = []
        for first in (again, others[:, :STRETCH]):
            row = torch.cat([first, between, again], dim=1)
            labels = torch.full_like(row, IGNORE)
            labels[:, -STRETCH + KNOWN - 1 : -1] = row[:, -STRETCH + KNOWN :]
            each.append(losses(model, row, labels).sum().item() / (len(row) * (STRETCH - KNOWN)))
        found[f"memory/copied/{distance}"] = each[1] - each[0]
    return found


def seen_before(ids: np.ndarray, labels: np.ndarray, segments: np.ndarray, vocab_size: int) -> np.ndarray:
    """Whether the pair of a token and its next one stands earlier in the same document of the row. [B, T]."""
    pairs = (segments * vocab_size + ids).astype(np.int64) * vocab_size + np.where(labels == IGNORE, 0, labels)
    found = np.zeros(ids.shape, dtype=bool)
    for row, where in zip(pairs, found, strict=True):
        _, first = np.unique(row, return_index=True)
        where[:] = True
        where[first] = False
    return found & (labels != IGNORE)


def rare_in(train: np.ndarray, ids: np.ndarray, labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """Whether these pairs are rare in the training text. [B, T]."""
    known, counts = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    pairs = ids.astype(np.int64) * vocab_size + np.where(labels == IGNORE, 0, labels)
    place = np.searchsorted(known, pairs).clip(max=len(known) - 1)
    return np.where(known[place] == pairs, counts[place], 0) <= RARE


@cache
def task_of(data: str, tokenizer: str, seq_len: int) -> Any:
    """By their YAML, prepared by the run already: the same for all runs of a text."""
    task: Any = build(OmegaConf.create(data), tokenizer=build(OmegaConf.create(tokenizer)), seq_len=seq_len)
    if isinstance(task, Text):
        task.prepare()
    return task


@cache
def asked(task: Text, num_rows: int) -> Asked:
    """The rows, at equal distances, and what is counted of their pairs: once for all models, in ten million tokens."""
    samples = task.validation_samples()
    num_rows = min(num_rows, len(samples))
    each = samples.__getitems__([i * len(samples) // num_rows for i in range(num_rows)])
    rows = each["input_ids"], each["labels"], each["segments"]
    ids, labels, segments = (x.numpy() for x in rows)
    V, train = task.vocab_size, task._shards("train")
    rare = rare_in(np.asarray(train.read(0, min(LOOKED_AT, train.num_tokens))), ids, labels, V) & (labels != IGNORE)
    return Asked(*rows, rare, seen_before(ids, labels, segments, V))


def seen_or_new(model: Any, given: Asked) -> dict[str, float]:
    nats, rare, before = losses(model, given.ids, given.labels, given.segments).numpy(), given.rare, given.before
    found = {"memory/seen": float(nats[rare & before].mean()), "memory/new": float(nats[rare & ~before].mean())}
    return found | {"memory/share": float((rare & before).sum() / (given.labels != IGNORE).sum().item())}


def inner(folder: Path) -> Iterator[tuple[str, float]]:
    """Of the last validation; nothing where the run did not look."""
    path = folder / InnerRegression.FILE
    rows = read_rows(path) if path.exists() else []
    newest = [row for row in rows if row["step"] == rows[-1]["step"]]
    for i, (first, last) in enumerate(newest[0]["positions"] if newest else []):
        for name in ("before", "after"):
            values = [head[i] for row in newest for head in row[name] if head[i] is not None]
            yield f"memory/{name}/{first}-{last - 1}", mean(values)


def look(folder: Path, num_rows: int = ROWS) -> dict[str, float]:
    """All of it, for the run of this folder."""
    trained = open_trained(folder)
    cfg = OmegaConf.load(folder / "config.yaml")
    task = task_of(*(OmegaConf.to_yaml(part, resolve=True) for part in (cfg.data, cfg.tokenizer)), cfg.seq_len)
    if not isinstance(task, Text):
        raise ValueError(f"{folder} was trained on data={cfg.data.get('name')}, which is no text of one corpus")
    model: Any = trained.model
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    given = asked(task, num_rows)
    return copied(model, given.ids) | seen_or_new(model, given) | dict(inner(folder))


def added(job: str, found: dict[str, float], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | found if row["job"] == job else row for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="whose runs are looked into")
    parser.add_argument("--results", type=Path, help="(default: docs/evidence/EXPERIMENT/results.jsonl)")
    given = parser.parse_args()
    results = Results(given.results or results_of(given.experiment))
    try:
        name, _ = params(given.experiment)
        if given.results and not given.results.exists():
            raise ValueError(f"--results={given.results} is not there")
        rows, gone = results.read(), []
        if not rows:
            raise ValueError(f"{results.path} has no results yet; {given.experiment} is run by scripts/evidence.py")
        for row in rows:
            folder = Job(name_of(row["words"], name), tuple(row["words"])).folder
            if any(key.startswith("memory/") for key in row):
                continue
            if not (folder / "result.json").exists():
                gone.append(row["job"])
                continue
            found = {key: round(x, 5) for key, x in look(folder).items()}
            change(results.path, partial(added, row["job"], found))
            print(row["job"], json.dumps(found), flush=True)
        elsewhere = f"{len(gone)} of {len(rows)} runs have no folder in {runs()} here: {', '.join(gone)}"
        if gone and len(gone) == len(rows):
            raise ValueError(elsewhere)
        if gone:
            print(elsewhere)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
