"""Times this repository against its peers, both in one run on one machine.

    python scripts/benchmark.py ops [--only NAME] [--repeats 15] [--kernels] [--json PATH]
    python scripts/benchmark.py train [--only NAME ...] [--size 340m] [--steps 10] [--kernels] [--json PATH]
    python scripts/benchmark.py starts [--only NAME ...] [--size 340m] [--at-once 3] [--json PATH]
    python scripts/benchmark.py length [--only NAME ...] [--lengths 2048 65536] [--json PATH]
    python scripts/benchmark.py decode [--only NAME ...] [--batches 1 16] [--contexts 1024] [--json PATH]
    python scripts/benchmark.py losses [--only NAME ...] [--size 50m] [--steps 200] [--seeds 0 1] [--json PATH]
    python scripts/benchmark.py prepare [--megabytes 1000] [--tokenizer bytes] [--num-workers 2]
    python scripts/benchmark.py loader [--megabytes 200] [--lengths 1024 4096] [--num-workers 2]

`ops` times operators, forward and forward + backward, interleaved so that a busy neighbour slows all alike: the median
of the repeats, the ratio to the first row of its size, on a GPU the time in kernels, without the waits for the host
between them, and the peak of allocated memory, and the difference of the output from that row's where they compute the
same. `train` times steps of whole models of equal parameters (scripts/benchmarks/contenders.py); `starts` takes two
steps of every preset, to see which start, and in what time and memory: several at a time compile few layers, and each
in its turn takes the whole model (scripts/benchmarks/starting.py); `length` the same number of tokens in longer and
longer sequences; `decode` texts that go on by generate (scripts/benchmarks/decoding.py); `losses` trains by kernels and
by PyTorch alone, to see that both learn the same (scripts/benchmarks/losses.py). `prepare` turns text into token
shards, and `loader` reads batches from them (scripts/benchmarks/data.py). Of whole models each has a process of its
own, and as many run at a time as there are GPUs, one on each. The exit code is 1 where a model has failed, after the
rows of all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.kernels import tuning
from scripts.benchmarks import contenders, data, decoding, losses, operators, starting, steps, whole
from scripts.benchmarks.timing import HEAD, compare, machine
from scripts.recipes import CONF

SIZES = sorted(path.stem for path in (CONF / "size").glob("*.yaml"))
ABOVE_ZERO = (
    *("limit", "total", "memory_gb", "batch", "seq_len", "steps", "repeats", "megabytes", "tokens", "most"),
    *("batches", "contexts", "lengths"),
)


def ops(only: str | None, repeats: int, kernels: bool, path: Path | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kernels and device == "cpu":
        sys.exit("error: --kernels needs a GPU, and there is none here")
    sizes = operators.cases(device)
    cases = {size: make for size, make in sizes.items() if not only or only in size}
    if not cases:
        sys.exit(f"error: --only={only} is part of no size here: {', '.join(sizes)}")
    print(f"{machine(device)}; error: largest difference to the first of its size, relative to its largest value")
    if device == "cuda" and importlib.util.find_spec("flash_qla") is None:
        print("FlashQLA's rows are left out: the package flash_qla is not installed")
    print(HEAD)
    if device == "cuda":
        tuning.without_loans()
    rows = []
    for size, make in cases.items():
        for row in compare(size, make(), device, repeats):
            print(row, flush=True)
            for name, (ms, calls) in row.kernels.items() if kernels else ():
                print(f"    {ms:8.3f} ms {calls:4} x {name[:90]}", flush=True)
            rows.append(row)
        if path:  # after each size, so that what is done is kept whatever comes
            path.write_text(json.dumps({**whole.environment(device), "rows": [asdict(row) for row in rows]}, indent=1))


def train(given: argparse.Namespace) -> whole.Report:
    device, sizes = place(given, contenders.DEFAULT, given.batch, given.seq_len)
    jobs = [step_job(name, sizes, device, given, documents=not given.whole) for name in given.only]
    return whole.report(jobs, steps.HEAD, about(device, sizes), limits(given, device), given.json)


def starts(given: argparse.Namespace) -> whole.Report:
    """Two steps of every preset: few layers beside others', and then the whole model, one at a time on each GPU."""
    if given.at_once < 1:
        sys.exit(f"error: --at-once={given.at_once} must be at least 1")
    device, sizes = place(given, contenders.PRESETS, given.batch, given.seq_len)
    whole_gb = share_gb = 0.0
    if device == "cuda":
        there = torch.cuda.get_device_properties(0).total_memory / 1e9
        whole_gb = min(there, given.memory_gb or (there if given.at_once == 1 else there / 2))
        # a process holds about one more, beside what it allocates
        share_gb = there if given.at_once == 1 else (there - whole_gb) / (given.at_once - 1) - 1
        if share_gb <= 0:
            sys.exit(
                f"error: --at-once={given.at_once} leaves nothing of {there:.0f} GB beside --memory-gb={whole_gb:g}"
            )
    # in the environment of the process that all are forked from
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // given.at_once)))
    limit = limits(given, device)
    limit = limit._replace(slots=limit.slots * given.at_once)
    with tempfile.TemporaryDirectory() as folder:
        common = {"sizes": list(sizes), "device": device, "compiled": not given.eager}
        common |= {"share_gb": share_gb, "memory_gb": whole_gb, "turn": f"{folder}/turn" if given.at_once > 1 else None}
        about_them = about(device, sizes) | {"at_once": given.at_once, "memory_gb": whole_gb, "eager": given.eager}
        known = started(given.json, about_them)
        if known and given.json is not None:  # of rows of several calls, the most
            about_them["at_once"] = max(given.at_once, json.loads(given.json.read_text())["at_once"])
        names = [name for name in given.only if name not in [row.name for row in known]]
        if known:
            print(f"{given.json} has {len(known)} that started in an earlier call; {len(names)} are left")
        jobs = [whole.Job("starting.start", {"name": n, **common}, starting.Started(n)) for n in names]
        return whole.report(jobs, starting.HEAD, about_them, limit, given.json, known=known)


def started(path: Path | None, about: dict[str, Any]) -> list[starting.Started]:
    """The presets that have started in an earlier call, by the file that it wrote."""
    if path is None or not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
    except ValueError:  # neither JSON nor even text
        before = None
    if not isinstance(before, dict) or not {"machine", "sizes", "memory_gb", "eager", "rows"} <= before.keys():
        sys.exit(f"error: --json={path} is there, and no file of `starts`; name another, or delete it")
    for key in ("machine", "sizes", "memory_gb", "eager"):
        if before[key] != about[key]:
            sys.exit(f"error: --json={path} has rows of {key}={before[key]}, and this is {key}={about[key]}")
    try:
        return [starting.Started(**row) for row in before["rows"] if not row["reason"]]
    except (KeyError, TypeError):
        sys.exit(f"error: --json={path} has a row that `starts` has not written; name another, or delete it")


def length(given: argparse.Namespace) -> whole.Report:
    """The same number of tokens in fewer and longer sequences, of one document each."""
    device, sizes = place(given, ["gated_delta", "titans", "kda", "softmax"])
    lengths = given.lengths or ([2**n for n in range(11, 17)] if device == "cuda" else [128, 256])
    lengths = list(dict.fromkeys(lengths))
    if odd := [T for T in lengths if max(lengths) % T]:
        sys.exit(f"error: --lengths: {odd[0]} is no part of {max(lengths)}; a step has as many tokens at each")
    each = [sizes._replace(B=max(lengths) // T, T=T) for T in lengths]
    jobs = [step_job(name, one, device, given, documents=False) for name in given.only for one in each]
    about_them = about(device, sizes) | {"sizes": f"{sizes.model}; {max(lengths):,} tokens a step"}
    return whole.report(jobs, steps.HEAD, about_them, limits(given, device), given.json)


def decode(given: argparse.Namespace) -> whole.Report:
    device, sizes = place(given, ["gated_delta", "titans", "softmax", "fla.gated_deltanet", "transformers.qwen3"])
    gpu = device == "cuda"
    contexts = given.contexts or ([2**n for n in range(10, 17, 2)] if gpu else [64])
    shapes = decoding.shapes_of(given.batches or ([1, 16, 64] if gpu else [1, 4]), contexts, given.most)
    if not shapes:
        sys.exit(f"error: --most={given.most} leaves nothing: it is tokens of all prompts, and the least has more")
    common = {"sizes": list(sizes), "device": device, "shapes": shapes, "tokens": given.tokens}
    common |= {"repeats": given.repeats, "dtype": given.dtype if gpu else "float32"}
    jobs = [whole.Job("decoding.decode", {"name": n, **common}, decoding.Decoded(n)) for n in given.only]
    about_them = about(device, sizes) | {"sizes": sizes.model}
    return whole.report(jobs, decoding.HEAD, about_them, limits(given, device), given.json)


def compare_losses(given: argparse.Namespace) -> whole.Report:
    """Each model by each path from each seed."""
    given.size = given.size or ("50m" if torch.cuda.is_available() else "tiny")
    device, sizes = place(given, ["gated_delta", "softmax"], given.batch, given.seq_len)
    if peers := [name for name in given.only if name not in contenders.PRESETS]:
        sys.exit(f"error: --only={peers[0]} has one path; only presets of conf/model have two")
    common = {"sizes": list(sizes), "device": device, "steps": given.steps}
    jobs = [
        whole.Job("losses.train", {"name": name, "path": path, "seed": seed, **common}, losses.Losses(name, path, seed))
        for name in given.only
        for seed in dict.fromkeys(given.seeds)
        for path in losses.PATHS
    ]
    report = whole.report(jobs, losses.HEAD, about(device, sizes), limits(given, device), given.json)
    print("\n".join(losses.compared([row for row in report.rows if isinstance(row, losses.Losses)])))
    return report


def place(
    given: argparse.Namespace, names: list[str], batch: int | None = None, seq_len: int | None = None
) -> tuple[str, contenders.Sizes]:
    """The device and the sizes; `names` are timed where none is asked for. Ends where one is not there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if getattr(given, "kernels", False) and device == "cpu":
        sys.exit("error: --kernels needs a GPU, and there is none here")
    given.only = list(dict.fromkeys(given.only or names))
    if found := [why for name in given.only if (why := contenders.known(name)) is not None]:
        sys.exit(f"error: --only: {found[0]}")
    return device, contenders.sizes_of(given.size or ("340m" if device == "cuda" else "tiny"), batch, seq_len)


def step_job(name: str, sizes: contenders.Sizes, device: str, given: argparse.Namespace, documents: bool) -> whole.Job:
    asked = {"name": name, "sizes": list(sizes), "device": device, "steps": getattr(given, "steps", 1)}
    asked |= {"kernels": getattr(given, "kernels", False), "documents": documents, "memory_gb": given.memory_gb}
    return whole.Job("steps.train", asked, steps.Trained(name, sizes.B * sizes.T, sizes.T))


def about(device: str, sizes: contenders.Sizes) -> dict[str, Any]:
    return whole.environment(device) | {"sizes": str(sizes), "gpus": len(each_gpu(device))}


def each_gpu(device: str) -> tuple[dict[str, str], ...]:
    """The environment of a process for each GPU that is seen, which sees that one alone."""
    if device != "cuda":
        return ({},)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return tuple({"CUDA_VISIBLE_DEVICES": each} for each in seen.split(","))


def limits(given: argparse.Namespace, device: str) -> whole.Limits:
    return whole.Limits(given.limit, given.total, given.cold, each_gpu(device))


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
    command.add_argument("--memory-gb", type=float, help="as on a GPU of so much memory, where this one has more")
    command.add_argument("--steps", type=int, default=10, help="that are timed, after three others")
    command.add_argument("--batch", type=int, help="sequences of a step; default: the size's micro_batch")
    command.add_argument("--seq-len", type=int, help="tokens of a sequence; default: the size's")
    command.add_argument("--whole", action="store_true", help="ours too get rows of one document each")
    command.add_argument("--kernels", action="store_true", help="also a step's time in GPU kernels, by kind")
    command = commands.add_parser("starts", help="two training steps of every preset, to see which start")
    of_models(command, limit=150)
    command.add_argument("--eager", action="store_true", help="blocks are not compiled, which takes most of the time")
    command.add_argument(
        "--memory-gb",
        type=float,
        help="of the card that the whole model is to fit; default: all, or half of it beside others",
    )
    command.add_argument("--at-once", type=int, default=1, help="processes on each GPU, or on a CPU, which compile")
    command.add_argument("--batch", type=int, help="sequences of a step; default: the size's micro_batch")
    command.add_argument("--seq-len", type=int, help="tokens of a sequence; default: the size's")
    command = commands.add_parser("length", help="training steps of as many tokens in longer and longer sequences")
    of_models(command, limit=300)
    command.add_argument("--memory-gb", type=float, help="as on a GPU of so much memory, where this one has more")
    command.add_argument("--steps", type=int, default=5, help="that are timed, after three others")
    command.add_argument("--lengths", type=int, nargs="+", help="default: 2,048 to 65,536, on a GPU")
    command = commands.add_parser("decode", help="texts that go on by generate, greedily")
    of_models(command, limit=600)
    command.add_argument("--batches", type=int, nargs="+", help="default: 1, 16 and 64, on a GPU")
    command.add_argument(
        "--contexts", type=int, nargs="+", help="tokens of a prompt; default: 1,024 to 65,536, on a GPU"
    )
    command.add_argument("--most", type=int, default=2**20, help="tokens of all prompts together")
    command.add_argument("--tokens", type=int, default=64, help="that are written and timed")
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument(
        "--dtype", choices=["autocast", "bfloat16"], default="autocast", help="of the weights, on a GPU"
    )
    command = commands.add_parser("losses", help="losses by kernels beside those by PyTorch's operators alone")
    of_models(command, limit=600)
    command.add_argument("--steps", type=int, default=200)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the weights")
    command.add_argument("--batch", type=int, default=8, help="sequences of a step")
    command.add_argument("--seq-len", type=int, default=1024, help="tokens of a sequence")
    command = commands.add_parser("prepare", help="text to token shards")
    command.add_argument("--megabytes", type=int, default=1000)
    command.add_argument("--tokenizer", choices=["bytes", "bpe"], default="bytes")
    command.add_argument("--num-workers", type=int, default=2)
    command = commands.add_parser("loader", help="token shards to batches, beside a memory map")
    command.add_argument("--megabytes", type=int, default=200)
    command.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    command.add_argument("--num-workers", type=int, default=2, help="beside none")
    command.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for name in ABOVE_ZERO:
        given = getattr(arguments, name, None)
        if given is not None and not 0 < (value := min(given) if isinstance(given, list) else given) < math.inf:
            sys.exit(f"error: --{name.replace('_', '-')}={value} must be above 0 and finite")
    path = getattr(arguments, "json", None)
    if path is not None and not path.parent.is_dir():
        sys.exit(f"error: --json={path}: the folder {path.parent} is not there")
    if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
        sys.exit(f"error: --json={path} can't be written")
    if path is not None and path.is_dir():
        sys.exit(f"error: --json={path} is a folder; name a file in it")
    if arguments.command == "ops":
        ops(arguments.only, arguments.repeats, arguments.kernels, arguments.json)
    elif arguments.command == "prepare":
        data.prepare(arguments.megabytes, arguments.tokenizer, arguments.num_workers)
    elif arguments.command == "loader":
        data.loader(arguments.megabytes, arguments.lengths, arguments.num_workers, arguments.repeats)
    else:
        of = {"train": train, "starts": starts, "length": length, "decode": decode, "losses": compare_losses}
        if failed := of[arguments.command](arguments).failed:
            sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
