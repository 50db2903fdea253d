"""Compares two values of a setting by pairs of runs that share everything else, the seed too.

    python train.py -m name=eps model=gated_delta,mamba2 seed=1,2,3 model.mixers.main.output_norm_eps=null,1e-5
    python scripts/pairs.py runs/eps model.mixers.main.output_norm_eps null 1e-5

Prints the last validation of each pair, and in how many the second value is not worse. Runs that are not finished, or
have another value, are left out and counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

METRICS = ("validation/bits_per_byte", "validation/nats")  # the first that a run has


class Pair(NamedTuple):
    """Two runs of a group: validation with the first and with the second value."""

    seed: int
    first: float
    second: float


def pairs_of(sweep: Path, setting: str, first: Any, second: Any) -> tuple[dict[str, list[Pair]], int]:
    """By the overrides in the folders' names without the setting and the seed; and how many runs are in no pair."""
    found: dict[tuple[str, int], dict[Any, float]] = {}
    folders = [path.parent for path in sorted(sweep.glob("*/config.yaml"))]
    for folder in folders:
        config = OmegaConf.load(folder / "config.yaml")
        value = OmegaConf.select(config, setting)
        if value not in (first, second) or not (folder / "result.json").exists():
            continue
        result = json.loads((folder / "result.json").read_text())
        label = ",".join(part for part in folder.name.split(",") if part.split("=")[0] not in (setting, "seed"))
        found.setdefault((label, config.seed), {})[value] = next(result[m] for m in METRICS if m in result)
    groups: dict[str, list[Pair]] = {}
    for (label, seed), values in sorted(found.items()):
        if len(values) == 2:
            groups.setdefault(label, []).append(Pair(seed, values[first], values[second]))
    return groups, len(folders) - 2 * sum(map(len, groups.values()))


def table(label: str, pairs: list[Pair], first: str, second: str) -> str:
    """Lines for a terminal."""
    lines = [label, f"{'seed':>6} {first:>10} {second:>10} {'difference':>10}"]
    lines += [f"{p.seed:6} {p.first:10.3f} {p.second:10.3f} {p.second - p.first:+10.3f}" for p in pairs]
    mean = [sum(values) / len(pairs) for values in ([p.first for p in pairs], [p.second for p in pairs])]
    lines.append(f"{'mean':>6} {mean[0]:10.3f} {mean[1]:10.3f} {mean[1] - mean[0]:+10.3f}")
    not_worse = sum(p.second <= p.first for p in pairs)
    return "\n".join([*lines, f"{second} is not worse than {first} in {not_worse} of {len(pairs)} pairs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("setting")
    parser.add_argument("first")
    parser.add_argument("second")
    arguments = parser.parse_args()
    values = [OmegaConf.create(f"value: {text}").value for text in (arguments.first, arguments.second)]
    groups, others = pairs_of(arguments.sweep, arguments.setting, *values)
    if not groups:
        sys.exit(f"error: {arguments.sweep} holds no pair of finished runs whose {arguments.setting} are these values")
    print("\n\n".join(table(label, pairs, arguments.first, arguments.second) for label, pairs in groups.items()))
    if others:
        print(f"\n{others} runs are in no pair")


if __name__ == "__main__":
    main()
