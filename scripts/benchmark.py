"""Times this repository against its peers, both in one run on one machine.

    python scripts/benchmark.py ops [--only NAME] [--repeats 15] [--json PATH]
    python scripts/benchmark.py prepare [--megabytes 1000] [--tokenizer bytes] [--num-workers 2]

`ops` times operators, forward and forward + backward, interleaved so that a busy neighbour slows all alike: the median
of the repeats, the ratio to the first row of its size, the peak of allocated memory on a GPU, and the difference of the
output from that row's. `prepare` turns text into token shards (scripts/benchmark_data.py).
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.decay import NoDecay
from models.features import Identity
from models.kernels import fla
from models.mixer import Mixer
from models.regression.delta import chunked_delta
from models.regression.kernel import Factor, parallel_intention
from models.regression.local import Softmax
from models.regression.local_polynomial import blocked_local_polynomial
from models.regression.pairs import Pairs, View
from scripts import benchmark_data

if TYPE_CHECKING:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

SECONDS = 120.0  # an operator that is slower than this, compilation included, is not repeated


@dataclass
class Case:
    """Operators that compute the same from the same inputs; the first is what the others are compared with."""

    inputs: list[Tensor]
    operators: dict[str, Callable[..., Tensor]]


@dataclass
class Row:
    """One line of the table: medians in milliseconds, gigabytes, and ratio and error against the first of its size."""

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


def cases(device: str) -> dict[str, Callable[[], Case]]:
    """size -> what makes its inputs and operators. Mixers to come add their sizes and their peers here."""
    if device == "cpu":
        return {
            "delta B4 T1024 H4 K64": lambda: delta_on_a_cpu(4, 1024, 4, 64),
            "delta B16 T256 H4 K32": lambda: delta_on_a_cpu(16, 256, 4, 32),
            "softmax B4 T1024 H4 K64": lambda: softmax_layer(4, 1024, 4, 64, device, torch.float32),
            "local linear B1 T512 H2 K32": lambda: local_linear(1, 512, 2, 32, device),
        }
    return {
        "delta B8 T4096 H8 K128": lambda: delta_on_a_gpu(8, 4096, 8, 128),
        "softmax B8 T4096 H8 K128": lambda: softmax_layer(8, 4096, 8, 128, device, torch.bfloat16),
        "local linear B1 T8192 H8 K64": lambda: local_linear(1, 8192, 8, 64, device),
        "intention B4 T1024 H8 K64": lambda: intention(4, 1024, 8, 64, device),
    }


def delta_on_a_cpu(*shape: int) -> Case:
    named = {"transformers, chunked": transformers_delta, "ours, chunked": ours_delta}
    return Case(draw(shape, torch.float32, "cpu"), named)


def delta_on_a_gpu(*shape: int) -> Case:
    """All compute o = q S with the peers' scale, 1/sqrt(K)."""
    named = {
        "ours, by fla": lambda q, k, v, g, b: fla.gated_delta(q * q.shape[-1] ** -0.5, k, v, b, g)[0],
        "ours, chunked": ours_delta,
        "fla chunk_kda": fla.raw_kda,
        "SDPA (another model)": lambda q, k, v, g, b: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
        ).transpose(1, 2),
    }
    if fla.route_gated_delta(torch.device("cuda")) == "chunk_gated_delta_rule":
        named = {"fla chunk_gated_delta_rule": fla.raw_gated_delta, **named}
    return Case(draw(shape, torch.bfloat16, "cuda"), named)


def softmax_layer(B: int, T: int, H: int, K: int, device: str, dtype: torch.dtype) -> Case:
    """The whole layer, projections and positions included, with the same weights in both."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config, Qwen3RotaryEmbedding

    torch.manual_seed(0)
    sizes = {"hidden_size": H * K, "num_attention_heads": H, "num_key_value_heads": H, "head_dim": K}
    config = Qwen3Config(**sizes, attn_implementation="sdpa")
    theirs, rotary = Qwen3Attention(config, layer_idx=0).to(device), Qwen3RotaryEmbedding(config).to(device)
    ours = mixer_of_qwen3(theirs)
    positions = torch.arange(T, device=device).unsqueeze(0)

    def at(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def operator(x: Tensor) -> Tensor:
            with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
                return layer(x)

        return operator

    named = {
        "transformers, Qwen3Attention": at(lambda x: theirs(x, rotary(x, positions), attention_mask=None)[0]),
        "ours, Mixer": at(lambda x: ours(x)[0]),
    }
    return Case([torch.randn(B, T, H * K, device=device).requires_grad_()], named)


def local_linear(B: int, T: int, H: int, K: int, device: str) -> Case:
    """Both solvers, float32; on a GPU beside softmax in bf16, which is another model and no more than a yardstick."""
    q, k, v = draw((B, T, H, K), torch.float32, device)[:3]
    beta, ridge = torch.full((H,), K**0.5, device=device), torch.full((H,), 0.1, device=device)

    def ours(widest_cholesky: int) -> Callable[..., Tensor]:
        def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, block = F.normalize(q, dim=-1), 256 if device == "cuda" else 64
            return blocked_local_polynomial(q, Pairs(k, v), beta, ridge, View(), 1, True, block, widest_cholesky)

        return operator

    named = {"ours, Cholesky": ours(K), "ours, conjugate gradients": ours(0)}
    return Case([q, k, v], named | ({"SDPA bf16 (another model)": half_softmax} if device == "cuda" else {}))


def intention(B: int, T: int, H: int, K: int, device: str) -> Case:
    q, k, v = draw((B, T, H, K), torch.float32, device)[:3]
    beta, ridge = torch.full((H,), K**0.5, device=device), torch.full((B, T, H), 0.1, device=device)
    empty = (k.new_empty(B, 0, H, K), k.new_empty(B, H, 0, 0), k.new_empty(B, H, 0, K), k.new_zeros(B, H))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel_intention(F.normalize(q, dim=-1), k, v, beta, ridge, View(), Factor(*empty))[0]

    return Case([q, k, v], {"ours, one Cholesky": ours, "SDPA bf16 (another model)": half_softmax})


def half_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (F.normalize(q, dim=-1), k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=q.shape[-1] ** 0.5).transpose(1, 2).float()


def mixer_of_qwen3(attention: Qwen3Attention) -> Mixer:
    """Our softmax mixer with the weights of transformers' Qwen3 attention: the same function."""
    config = attention.config
    K = attention.head_dim
    mixer = Mixer(
        config.hidden_size,
        layer_index=0,
        regressor=partial(Softmax, inverse_temperature=K**-0.5),
        decay=NoDecay,
        features=Identity,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        key_dim=K,
        value_dim=K,
        qk_norm="rms",
        rotary=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
    ).to(attention.q_proj.weight)
    with torch.no_grad():
        theirs = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        mixer.projection.weight.copy_(torch.cat(theirs))
        mixer.output.weight.copy_(attention.o_proj.weight)
        mixer.q_norm.weight.copy_(attention.q_norm.weight)
        mixer.k_norm.weight.copy_(attention.k_norm.weight)
    return mixer


def ours_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    return chunked_delta(q * q.shape[-1] ** -0.5, k, v, step_size, log_decay, chunk=64 if q.is_cuda else 32)[0]


def transformers_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next

    function = modeling_qwen3_next.torch_chunk_gated_delta_rule
    while hasattr(function, "__wrapped__"):  # the wrapper takes fla where it is installed, even without a GPU
        function = function.__wrapped__
    return function(q, k, v, log_decay, step_size, output_final_state=True)[0]


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


def compare(size: str, case: Case, device: str, repeats: int) -> list[Row]:
    inputs, named = case.inputs, case.operators
    upstream = torch.randn_like(next(iter(named.values()))(*inputs))
    outputs, peaks, works = {}, {}, {}
    for name, operator in named.items():

        def both(operator: Callable[..., Tensor] = operator) -> None:
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
        first = outputs[rows[0].name]
        row.error = ((outputs[row.name] - first).abs().max() / first.abs().max()).item()
    return rows


def ops(only: str | None, repeats: int, path: Path | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{machine(device)}; error: largest difference to the first of its size, relative to its largest value")
    print(f"{'size':28} {'operator':28} {'forward ms':>11} {'+ backward':>11} {'speed':>6} {'peak GB':>8} {'error':>8}")
    rows = []
    for size, make in cases(device).items():
        if only and only not in size:
            continue
        for row in compare(size, make(), device, repeats):
            peak = f"{row.peak_gb:8.2f}" if row.peak_gb else " " * 8
            line = f"{row.size:28} {row.name:28} {row.forward_ms:11.2f} {row.both_ms:11.2f} {row.ratio:6.2f}"
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
    command = commands.add_parser("prepare", help="text to token shards")
    command.add_argument("--megabytes", type=int, default=1000)
    command.add_argument("--tokenizer", choices=["bytes", "bpe"], default="bytes")
    command.add_argument("--num-workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.command == "ops":
        ops(arguments.only, arguments.repeats, arguments.json)
    else:
        benchmark_data.prepare(arguments.megabytes, arguments.tokenizer, arguments.num_workers)


if __name__ == "__main__":
    main()
