"""A step's GPU kernels by what they are for, told from their names.

The first rule that fits decides. torch.compile names its kernels after what it fused (`triton_poi_fused_silu_mul_3`),
libraries and this repository after the function. What no rule knows is `other`, and is listed.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).parents[2] / "models" / "kernels"

RULES = {
    "optimizer and clipping": r"multi_tensor|adam|lpnorm|foreach",
    "attention": r"flash|sdpa|fmha|attention|flex",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv|triton_(tem|mm)",
    "convolution": r"conv",
    "cross-entropy": r"cross_entropy|softmax|logsumexp|nll_loss|scatter|gather|embedding|index",
    "regression": r"chunk|delta|w_u|wy_repr|solve|merge_\d+x|kda|mesa|cumsum|recurrent|momentum|titans|ttt",
    "rotary positions": r"cos|sin(?!g)|rotary|rope",
    "norms": r"rsqrt|norm|linalg_vector|var_mean",
    "activations": r"silu|swiglu|sigmoid|softplus|gelu",
    "casts, copies, sums": r"copy|memcpy|memset|catarray|cat|elementwise|reduce|fill|add|mul|triton_(poi|red|per)",
}
OF_FOLDERS = {
    "attention": "attention",
    "local_linear": "attention",
    "pairs": "convolution",
    "columns": "casts, copies, sums",
    "cross_entropy": "cross-entropy",
    "residual": "norms",
    "read_out": "norms",
    "swiglu": "activations",
}


class Kind(NamedTuple):
    """Milliseconds of a step in kernels of one kind, and how many were launched."""

    ms: float
    launches: int


@cache
def own() -> dict[str, str]:
    """The names of the repository's Triton kernels and their kinds: by their folder, else regression."""
    found = {}
    for path in sorted(KERNELS.rglob("*.py")):
        folder = path.relative_to(KERNELS).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list):
                found[node.name] = OF_FOLDERS.get(folder, "regression")
    return found


def kind_of(name: str) -> str:
    if name in own():
        return own()[name]
    return next((kind for kind, rule in RULES.items() if re.search(rule, name.lower())), "other")


def by_kind(kernels: dict[str, tuple[float, int]]) -> dict[str, Kind]:
    """name -> (ms, launches) of one step, summed by kind, the longest first."""
    sums: dict[str, Kind] = {}
    for name, (ms, launches) in kernels.items():
        before = sums.get(kind_of(name), Kind(0.0, 0))
        sums[kind_of(name)] = Kind(before.ms + ms, before.launches + launches)
    return dict(sorted(sums.items(), key=lambda pair: -pair[1].ms))
