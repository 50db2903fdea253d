"""Times this repository against its peers, both in one run on one machine.

    python scripts/benchmark.py ops [--only NAME] [--repeats 15] [--json PATH]

`ops` times operators, forward and forward + backward, interleaved so that a busy neighbour slows all alike: the median
of the repeats, the ratio to the first row of its size, the peak of allocated memory on a GPU, and the error of the
output against that row.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.kernels import fla
from models.regression.delta import chunked_delta

Operator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v, log_decay, step_size -> o
SECONDS = 120.0  # an operator that is slower than this, compilation included, is not repeated


@dataclass
class Row:
    size: str
    name: str
    forward_ms: float
    both_ms: float
    ratio: float | None = None
    peak_gb: float | None = None
    error: float | None = None


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line for line in lines if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def operators(device: str) -> dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Operator]]]:
    """size -> shape (B, T, H, K), dtype, named operators; the first of a size is what the others are compared with.

    All compute o = q S with the peers' scale, 1/sqrt(K). Mixers to come add their sizes and their peers here.
    """
    if device == "cpu":
        delta = {"transformers, chunked": transformers_delta, "ours, chunked": ours_delta}
        shapes = {"delta B4 T1024 H4 K64": (4, 1024, 4, 64), "delta B16 T256 H4 K32": (16, 256, 4, 32)}
        return {name: (shape, torch.float32, delta) for name, shape in shapes.items()}
    delta = {
        "ours, by fla": lambda q, k, v, g, b: fla.gated_delta(q * q.shape[-1] ** -0.5, k, v, b, g)[0],
        "ours, chunked": ours_delta,
        "fla chunk_kda": fla_kda,
        "SDPA (another model)": lambda q, k, v, g, b: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
        ).transpose(1, 2),
    }
    if fla.route_gated_delta(torch.device("cuda")) == "chunk_gated_delta_rule":
        delta = {"fla chunk_gated_delta_rule": fla_gated_delta, **delta}
    return {"delta B8 T4096 H8 K128": ((8, 4096, 8, 128), torch.bfloat16, delta)}


def ours_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    return chunked_delta(q * q.shape[-1] ** -0.5, k, v, step_size, log_decay, chunk=64 if q.is_cuda else 32)[0]


def transformers_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next

    function = modeling_qwen3_next.torch_chunk_gated_delta_rule
    while hasattr(function, "__wrapped__"):  # the wrapper takes fla where it is installed, even without a GPU
        function = function.__wrapped__
    return function(q, k, v, log_decay, step_size, output_final_state=True)[0]


def fla_gated_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, log_decay, step_size, output_final_state=True)[0]


def fla_kda(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.kda import chunk_kda

    log_decay = log_decay.unsqueeze(-1).expand(k.shape).contiguous()
    return chunk_kda(q, k, v, log_decay, step_size, output_final_state=True)[0]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device=device) for _ in range(3))
    gates = [F.logsigmoid(torch.randn(shape[:3], device=device) + 3), torch.rand(shape[:3], device=device)]
    return [x.requires_grad_() for x in (*(x.to(dtype) for x in (q, F.normalize(k, dim=-1), v)), *gates)]


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare(
    size: str, shape: tuple[int, ...], dtype: torch.dtype, named: dict[str, Operator], device: str, repeats: int
) -> list[Row]:
    inputs = draw(shape, dtype, device)
    upstream = torch.randn(shape, device=device).to(dtype)
    outputs, peaks, works = {}, {}, {}
    for name, operator in named.items():

        def both(operator: Operator = operator) -> None:
            torch.autograd.grad(operator(*inputs), inputs, upstream, allow_unused=True)

        begin = time.perf_counter()
        outputs[name] = operator(*inputs).detach().float()
        both()  # compiles and tunes
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            both()
            peaks[name] = torch.cuda.max_memory_allocated() / 1e9
        if (took := time.perf_counter() - begin) > SECONDS:
            print(f"{size}  {name}: {took:.0f} s before the first repeat, left out", file=sys.stderr)
            continue
        works[name] = (lambda operator=operator: operator(*inputs), both)
    times = {name: ([], []) for name in works}
    for _ in range(repeats):
        for name, pair in works.items():
            for work, record in zip(pair, times[name], strict=True):
                record.append(seconds(work, device) * 1e3)
    rows = [Row(size, name, *(round(statistics.median(r), 3) for r in records)) for name, records in times.items()]
    for row in rows:
        row.ratio, row.peak_gb = round(rows[0].both_ms / row.both_ms, 2), peaks.get(row.name)
        row.error = (outputs[row.name] - outputs[rows[0].name]).abs().max().item()
    return rows


def ops(only: str | None, repeats: int, path: Path | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine(device))
    print(f"{'size':24} {'operator':28} {'forward ms':>11} {'+ backward':>11} {'speed':>6} {'peak GB':>8} {'error':>8}")
    rows = []
    for size, (shape, dtype, named) in operators(device).items():
        if only and only not in size:
            continue
        for row in compare(size, shape, dtype, named, device, repeats):
            peak = f"{row.peak_gb:8.2f}" if row.peak_gb else " " * 8
            line = f"{row.size:24} {row.name:28} {row.forward_ms:11.2f} {row.both_ms:11.2f} {row.ratio:6.2f}"
            print(f"{line} {peak} {row.error:8.0e}", flush=True)
            rows.append(row)
    if path:
        path.write_text(json.dumps({"machine": machine(device), "rows": [asdict(row) for row in rows]}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("ops", help="operators against their peers")
    command.add_argument("--only", help="sizes whose name contains this")
    command.add_argument("--repeats", type=int, default=15)
    command.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    ops(arguments.only, arguments.repeats, arguments.json)


if __name__ == "__main__":
    main()
