"""Compiles the kernels of a layer for an H100, without one, and prints what they need of it.

    python scripts/compiled.py titans [--key-dim 128] [--dtype bfloat16] [SETTING=VALUE ...]

For every kernel that the layer's forward and backward pass would launch: its launch configuration, registers and bytes
of stack (spilled registers) a thread, bytes of shared memory a program, and how often it multiplies on tensor cores by
warps (mma) and warp groups (wgmma). Registers end at 255 and shared memory at 232,448 bytes. The last column counts
instructions that take the stack pointer for a number, a fault of NVIDIA's assembler (docs/kernels.md): a kernel with
any reads memory where there is none. Settings are the regressor's, such as grad_batch=16. Needs Triton, no GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hydra.errors import HydraException
from torch import Tensor

from conf.command import sentence
from models.regression.memory import Memory
from models.regression.regressor import Choice
from scripts.benchmarks.contenders import PRESETS
from scripts.recipes import composed, mixer_of

SHARED = 232_448  # bytes of shared memory that a program can have on an H100
HEAD = (
    f"{'kernel':24} {'warps':>5} {'stages':>6} {'registers':>9} {'stack':>6} {'shared':>8} {'mma':>5} {'wgmma':>5} "
    f"{'faults':>6}"
)


class Compiled(NamedTuple):
    """One kernel: numbers of warps and stages, registers and bytes of stack a thread, bytes of shared memory, its
    instructions on tensor cores, and those that take the stack pointer for a number."""

    name: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    mma: int
    wgmma: int
    faults: int

    def __str__(self) -> str:
        numbers = f"{self.warps:5} {self.stages:6} {self.registers:9} {self.stack:6} {self.shared:8,}"
        return f"{self.name:24} {numbers} {self.mma:5} {self.wgmma:5} {self.faults:6}"


@contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Where kernels would be launched they are compiled and noted; what they would write stays as it is."""
    from triton.runtime.jit import JITFunction

    found: list[Compiled] = []
    launch = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: found.append(_compile(self, args, options))
    try:
        yield found
    finally:
        JITFunction.run = launch


def _compile(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Compiled:
    """As Triton does at a launch: ones and multiples of 16 are known to the compiler, and None is left out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters = {p.name: p for p in kernel.params}
    given = dict(zip(parameters, args, strict=False)) | {k: v for k, v in options.items() if k in parameters}
    signature, constants, attributes = {}, {}, {}

    def describe(value: Any, parameter: Any, place: tuple[int, ...]) -> Any:
        """The type of an argument, or of each in a tuple of them."""
        if isinstance(value, tuple) and not parameter.is_constexpr:
            return type(value)(*(describe(x, parameter, (*place, i)) for i, x in enumerate(value)))
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, Tensor) or (special and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        return _type(value)

    for i, (name, parameter) in enumerate(parameters.items()):
        signature[name] = describe(given[name], parameter, (i,))
    launch = {k: v for k, v in options.items() if k not in parameters}
    made = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", 90, 32), options=launch
    )
    registers, stack, faults = _resources(made.asm["cubin"])
    ptx, about = made.asm["ptx"], made.metadata
    counts = ptx.count("mma.sync.aligned"), ptx.count("wgmma.mma_async.sync")
    return Compiled(
        kernel.fn.__name__, about.num_warps, about.num_stages, registers, stack, about.shared, *counts, faults
    )


TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}


def _type(x: Tensor | float) -> str:
    if isinstance(x, Tensor):
        return "*" + TYPES[x.dtype]
    return "i32" if isinstance(x, int) else "fp32"


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers and bytes of stack a thread, and instructions that take the stack pointer for a number, by the tool
    that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.findall(rf"{name}:(\d+)", said)[0] for name in ("REG", "STACK"))
    return int(registers), int(stack), _faults(said)


def _faults(sass: str) -> int:
    """How many instructions read R1 other than as an address or to move it by a constant."""
    taken = [line for line in re.findall(r"/\*[0-9a-f]{4,5}\*/(.*?);", sass) if re.search(r"\bR1\b", line)]
    rightly = r"\[R1(\+-?0x[0-9a-f]+)?\]|\w+ R1, c\[|\w+ R1, (PT, PT, )?R1, -?0x[0-9a-f]+"
    return sum(re.search(rightly, re.sub(r"\s+", " ", line)) is None for line in taken)


def kernels_of(preset: str, key_dim: int, dtype: torch.dtype, *settings: str) -> list[Compiled]:
    """Of one layer with two heads, forward and backward, each once, in the order of their launches."""
    if key_dim < 1:
        raise ValueError(f"--key-dim={key_dim} must be at least 1")
    if "regressor" not in composed(preset).model.mixers.get("main", {}):
        raise ValueError(
            f"{preset} is a memory beside attention, or none; ask for the preset of a memory, such as titans"
        )
    sizes = f"model.num_heads=2 model.hidden_size={2 * key_dim} model.mixers.main.regressor.backend=triton".split()
    chosen = [f"model.mixers.main.regressor.{setting}" for setting in settings]
    try:
        mixer = mixer_of(composed(preset, *sizes, *chosen)).to(dtype)
    except HydraException as error:
        raise ValueError(sentence(error, [f"model={preset}", *chosen])) from error
    refusals = mixer.regressor.accelerators(torch.device("cuda"), dtype)
    if "triton" not in refusals or refusals["triton"] is not None:
        raise ValueError(f"{preset} has no kernels of ours here: {refusals.get('triton', 'none were written')}")
    mixer.regressor.choose = lambda *_: Choice("triton", "")
    if isinstance(mixer.regressor, Memory):
        mixer.regressor.chunk = mixer.regressor.chunk or 64  # as tokens_at_once has it on a GPU
    x = torch.randn(1, 130, 2 * key_dim, dtype=dtype).requires_grad_()
    with compiling() as found:
        y, _ = mixer(x)
        y.sum().backward()
    return list(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS, metavar="preset")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--key-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    arguments = parser.parse_intermixed_args()
    try:
        found = kernels_of(arguments.preset, arguments.key_dim, getattr(torch, arguments.dtype), *arguments.settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(HEAD)
    print("\n".join(map(str, found)))


if __name__ == "__main__":
    main()
