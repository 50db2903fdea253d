"""How many digits the momentum rule keeps in float32: ours beside fla's formula, on the same inputs.

    python scripts/momentum_accuracy.py [--tokens 512] [--chunk 64] [--json PATH]

Errors are relative, |x - y| / |y| in the Euclidean norm, to the token loop in float64: of the output, and the largest
of the gradients by q, k, v, step size, momentum and decay (log). Momenta are drawn from sigmoid(N(0, 1)) or constant,
decays from sigmoid(N(4, 1)), steps are (1 - eta) sigmoid(N(0, 1)), keys have length one. On a CPU in a few seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.regression.linear.momentum import chunked_momentum, recurrent_momentum
from scripts.benchmarks import peers

MOMENTA = (None, 0.99, 0.95, 0.9, 0.8, 0.6, 0.3, 0.1, 1e-2, 1e-4, 1e-6)  # None: drawn
B, H, K, V = 1, 2, 32, 32


def draw(tokens: int, momentum: float | None) -> list[Tensor]:
    """q, k, v, step_size, log_momentum, log_decay, float64."""
    g = torch.Generator().manual_seed(0)

    def normal(*width: int) -> Tensor:
        return torch.randn(B, tokens, H, *width, generator=g, dtype=torch.float64)

    q, k, v = normal(K), F.normalize(normal(K), dim=-1), normal(V)
    logit = normal() if momentum is None else torch.logit(torch.full_like(normal(), momentum))
    return [q, k, v, (-logit).sigmoid() * normal().sigmoid(), F.logsigmoid(logit), F.logsigmoid(normal() + 4)]


def output_and_gradients(form: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    o = form(*leaves)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return [o, *torch.autograd.grad((o * weights).sum(), leaves)]


def errors(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Of the output, and the largest of the gradients; NaN where one is."""
    each = torch.stack([(x.double() - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)])
    return each[0].item(), each[1:].max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # fla's, that there is no GPU
    ours = partial(chunked_momentum, chunk=options.chunk)
    forms: dict[str, Callable[..., Tensor]] = {
        "ours": lambda *x: ours(*x)[0],
        "fla": partial(peers.momentum_delta_formula, chunk=options.chunk),
    }
    print(f"float32 against the float64 token loop, {options.tokens} tokens in chunks of {options.chunk}")
    print(f"{'momentum':>16}" + "".join(f"{f'{name}: o':>13}{'gradients':>11}" for name in forms))
    rows = []
    for momentum in MOMENTA:
        inputs = draw(options.tokens, momentum)
        exact = output_and_gradients(lambda *x: recurrent_momentum(*x)[0], inputs, torch.float64)
        row = {name: errors(output_and_gradients(f, inputs, torch.float32), exact) for name, f in forms.items()}
        rows.append({"momentum": momentum, **row})
        label = "sigmoid(N(0,1))" if momentum is None else f"{momentum:g}"
        print(f"{label:>16}" + "".join(f"{o:13.1e}{gradients:11.1e}" for o, gradients in row.values()))
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
