"""Times this repository against its peers, both in one run on one machine.

    python scripts/benchmark.py ops [--only NAME] [--repeats 15] [--kernels] [--json PATH]
    python scripts/benchmark.py train [--only NAME ...] [--size 340m] [--steps 10] [--kernels] [--json PATH]
    python scripts/benchmark.py prepare [--megabytes 1000] [--tokenizer bytes] [--num-workers 2]

`ops` times operators, forward and forward + backward, interleaved so that a busy neighbour slows all alike: the median
of the repeats, the ratio to the first row of its size, on a GPU the time in kernels, without the waits for the host
between them, and the peak of allocated memory, and the difference of the output from that row's where they compute the
same. `train` times steps of whole models of equal parameters (scripts/benchmarks/contenders.py), each in a process of
its own. `prepare` turns text into token shards (scripts/benchmarks/data.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.benchmarks import contenders, data, operators, training
from scripts.benchmarks.timing import HEAD, compare, machine
from scripts.recipes import CONF

SIZES = sorted(path.stem for path in (CONF / "size").glob("*.yaml"))


def ops(only: str | None, repeats: int, kernels: bool, path: Path | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kernels and device == "cpu":
        sys.exit("error: --kernels needs a GPU, and there is none here")
    sizes = operators.cases(device)
    cases = {size: make for size, make in sizes.items() if not only or only in size}
    if not cases:
        sys.exit(f"error: --only={only} is part of no size here: {', '.join(sizes)}")
    print(f"{machine(device)}; error: largest difference to the first of its size, relative to its largest value")
    print(HEAD)
    rows = []
    for size, make in cases.items():
        for row in compare(size, make(), device, repeats):
            print(row, flush=True)
            for name, (ms, calls) in row.kernels.items() if kernels else ():
                print(f"    {ms:8.3f} ms {calls:4} x {name[:90]}", flush=True)
            rows.append(row)
    if path:
        path.write_text(json.dumps({"machine": machine(device), "rows": [asdict(row) for row in rows]}, indent=1))


def train(given: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = given.only or contenders.DEFAULT
    refuse(names, given.kernels and device == "cpu")
    sizes = contenders.sizes_of(given.size or ("340m" if device == "cuda" else "tiny"), given.batch, given.seq_len)
    way = training.Way(
        device, given.steps, given.limit, given.total, given.cold, given.kernels, documents=not given.whole
    )
    training.train([(name, sizes) for name in names], way, given.json)


def refuse(names: list[str], kernels_on_a_cpu: bool) -> None:
    """Ends where something is asked for that is not there."""
    if kernels_on_a_cpu:
        sys.exit("error: --kernels needs a GPU, and there is none here")
    if found := [why for name in names if (why := contenders.known(name)) is not None]:
        sys.exit(f"error: --only: {found[0]}")


def of_models(command: argparse.ArgumentParser, limit: float) -> None:
    """The settings of the commands that time whole models."""
    command.add_argument("--only", nargs="+", metavar="NAME", help="presets of conf/model, and peers")
    command.add_argument("--size", choices=SIZES, help="default: 340m on a GPU, tiny on a CPU")
    command.add_argument("--limit", type=float, default=limit, help="seconds of one model, all its work included")
    command.add_argument("--total", type=float, help="seconds of all; models that come later are left out")
    command.add_argument("--cold", action="store_true", help="each begins with empty caches of compiled kernels")
    command.add_argument("--json", type=Path, help="also write the rows here, after each model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("ops", help="operators against their peers")
    command.add_argument("--only", help="sizes whose name contains this")
    command.add_argument("--repeats", type=int, default=15)
    command.add_argument("--kernels", action="store_true", help="also each GPU kernel of a forward + backward pass")
    command.add_argument("--json", type=Path, help="also write the rows here")
    command = commands.add_parser("train", help="training steps of whole models")
    of_models(command, limit=300)
    command.add_argument("--steps", type=int, default=10, help="that are timed, after three others")
    command.add_argument("--batch", type=int, help="sequences of a step; default: the size's micro_batch")
    command.add_argument("--seq-len", type=int, help="tokens of a sequence; default: the size's")
    command.add_argument("--whole", action="store_true", help="ours too get rows of one document each")
    command.add_argument("--kernels", action="store_true", help="also a step's time in GPU kernels, by kind")
    command = commands.add_parser("prepare", help="text to token shards")
    command.add_argument("--megabytes", type=int, default=1000)
    command.add_argument("--tokenizer", choices=["bytes", "bpe"], default="bytes")
    command.add_argument("--num-workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.command == "ops":
        ops(arguments.only, arguments.repeats, arguments.kernels, arguments.json)
    elif arguments.command == "train":
        train(arguments)
    else:
        data.prepare(arguments.megabytes, arguments.tokenizer, arguments.num_workers)


if __name__ == "__main__":
    main()
