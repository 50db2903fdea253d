"""Counts what torch.compile is given of a preset's first step on a GPU, without one.

    python scripts/graphs.py atlas moneta [--seq-len 512]

Two layers of `size=tiny` take two steps on packed documents, in float32 on a CPU, by PyTorch's own forms. For each
graph: the function that it begins in, and the operations of its forward and its backward pass, from which Inductor
would make kernels. It is not called. A function that stands there more than once has several forms. What is said of
the second step was not compiled in the first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule

from models.kernels import backend
from scripts.benchmarks import contenders

HEAD = f"  {'begins in':56}{'forward':>8}{'backward':>9}"


class Graph:
    """One of Dynamo's. forward, backward: how many operations."""

    def __init__(self, module: Any) -> None:
        first = module.compile_subgraph_reason.user_stack[0]
        self.begins = f"{first.name} of {Path(first.filename).name}"
        self.forward = self.backward = 0

    def __str__(self) -> str:
        return f"{self.begins:56}{self.forward:8}{self.backward:9}"


@contextmanager
def counted() -> Iterator[list[Graph]]:
    """torch.compile counts, and runs what it has counted; our own forms are compiled as on a GPU."""
    found: list[Graph] = []
    compile_ = torch.compile

    def compiler(module: GraphModule, inputs: list[Any]) -> Any:
        graph = Graph(module)
        found.append(graph)

        def counts(name: str) -> Any:
            def count(made: GraphModule, _: Any) -> Any:
                setattr(graph, name, sum(node.op == "call_function" for node in made.graph.nodes))
                return make_boxed_func(made.forward)

            return count

        made = aot_autograd(
            fw_compiler=counts("forward"),
            bw_compiler=counts("backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        return made(module, inputs)

    def compiled(form: Any, dynamic: bool | None = None, options: Any = None) -> Any:
        return compile_(form, backend=compiler, dynamic=dynamic)

    asking = [m for m in sys.modules.values() if getattr(m, "compiles", None) is backend.compiles]
    before = backend.compiles
    for module in asking:
        module.compiles = lambda device: True  # type: ignore[attr-defined]
    try:
        with patch.object(torch, "compile", compiled):
            yield found
    finally:
        for module in asking:
            module.compiles = before  # type: ignore[attr-defined]


def count(name: str, seq_len: int) -> None:
    sizes = contenders.sizes_of("tiny", batch=2, seq_len=seq_len)._replace(layers=2)
    batch = contenders.batch_of(sizes, "cpu", documents=True)
    torch._dynamo.reset()  # presets share functions, of which it compiles a few forms in a process and no more
    with counted() as found:
        model: Any = contenders.ours(name, sizes, "cpu", compiled=False).model
        for block in model.blocks:
            block.compile()
        model.alike = True
        for step in ("first", "second"):
            begin, known = time.perf_counter(), len(found)
            contenders.nats(model, batch).backward()
            new = found[known:]
            passes = sum(x.forward for x in new), sum(x.backward for x in new)
            said = f"{name}, {step} step: {len(new)} graphs, {time.perf_counter() - begin:.1f} s"
            print(f"{said:58}{passes[0]:8,}{passes[1]:9,}", *new, sep="\n  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", metavar="NAME", help="presets of conf/model")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence, of which there are two")
    arguments = parser.parse_args()
    for name in arguments.presets:
        if name not in contenders.PRESETS:
            sys.exit(f"error: {name} is no preset of conf/model")
    if arguments.seq_len < 1:
        sys.exit(f"error: --seq-len={arguments.seq_len} must be at least 1")
    print(HEAD)
    for name in arguments.presets:
        count(name, arguments.seq_len)


if __name__ == "__main__":
    main()
