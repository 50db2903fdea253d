"""The momentum kernels at the size of a model: the same bits in every run, and where gradients are off if they are.

What the other tests see as one number, the distance of a whole gradient, is here one for every chunk and for every
place in a chunk, since a kernel that goes wrong does so in some programs or in some rows.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.momentum import CHUNK
from models.regression.linear.momentum import chunked_momentum, kernel_momentum

NAMES = ("q", "k", "v", "step_size", "log_momentum", "log_decay")
MODEL = (16, 2048, 8, 128)  # B, T, H, K = V of size=340m
GATES = {  # means of the logits of momentum, decay and step size
    "usual": (0.0, 3.0, 0.0),
    "momenta near 0": (-12.0, 3.0, 0.0),
    "momenta near 1": (8.0, 3.0, 0.0),
    "decays near 0": (0.0, -12.0, 0.0),
    "decays near 1": (0.0, 12.0, 0.0),
    "all last": (8.0, 12.0, 0.0),
    "large steps": (0.0, 3.0, 12.0),
    "large steps, all last": (3.0, 12.0, 12.0),
}


class Given(NamedTuple):
    """Arguments of a form in float32, q, k and v rounded to bf16; and the gradient by its outputs."""

    inputs: list[Tensor]
    segments: Tensor | None
    do: Tensor


def given(
    shape: tuple[int, int, int, int], gates: str = "usual", documents: int | None = 500, device: str = "cuda"
) -> Given:
    """Tied gates (momentum.py) of a model's layer at its start, but for the means of their logits. documents: their
    mean length; each row has its own."""
    (B, T, H, K), generator = shape, torch.Generator(device).manual_seed(0)
    momentum, decay, step = GATES[gates]

    def normal(*sizes: int) -> Tensor:
        return torch.randn(B, T, *sizes, generator=generator, device=device)

    q, k, v, do = (normal(H, K) for _ in range(4))
    logit, log_decay = (normal(H) + momentum).clamp(max=12.0), F.logsigmoid(normal(H) + decay)
    log_written = F.logsigmoid(-logit) + log_decay
    step_size = (log_written + F.logsigmoid(-logit)).exp() * (normal(H) + step).sigmoid()
    log_momentum = log_written + F.pad(logit[:, :-1], (0, 0, 1, 0))
    starts = torch.rand(B, T, generator=generator, device=device) < 1 / (documents or T)
    pairs = [x.bfloat16().float() for x in (q, F.normalize(k, dim=-1), v)]
    segments = starts.cumsum(1) if documents else None
    return Given([*pairs, step_size, log_momentum, log_decay], segments, do.bfloat16().float())


def found(form, given: Given, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Outputs and gradients, [B, T, H, *]; q, k, v and the gradient by outputs in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    own = [x.to(dtype if i < 3 else wide).requires_grad_() for i, x in enumerate(given.inputs)]
    o, _ = form(*own, segments=given.segments)
    gradients = torch.autograd.grad(o, own, given.do.to(o.dtype))
    return {"o": o.detach()} | dict(zip(NAMES, gradients, strict=True))


class Distance(NamedTuple):
    """Of one result from the right one, relative to its length: of the whole; of the worst chunk, by the length that
    chunks have on average, and which it is; and of the worst place in a chunk."""

    whole: float
    chunk: float
    at: int
    place: float
    place_at: int

    def __str__(self) -> str:
        return f"{self.whole:.1e}  chunk {self.at}: {self.chunk:.1e}  place {self.place_at}: {self.place:.1e}"


def distance(x: Tensor, right: Tensor) -> Distance:
    x, right = (y.double().flatten(3) if y.ndim > 3 else y.double().unsqueeze(-1) for y in (x, right))
    spare = -x.shape[1] % CHUNK
    wrong, right = (F.pad(y, (0, 0, 0, 0, 0, spare)).unflatten(1, (-1, CHUNK)) for y in (x - right, right))
    length = right.norm().clamp(min=1e-30)
    # [B, N, C, H, *]
    chunks = wrong.square().sum((2, 4)).flatten().sqrt() * wrong.square().sum((2, 4)).numel() ** 0.5 / length
    places = wrong.square().sum((0, 1, 3, 4)).sqrt() * CHUNK**0.5 / length
    at, place = int(chunks.argmax()), int(places.argmax())
    return Distance((wrong.norm() / length).item(), chunks[at].item(), at, places[place].item(), place)


def distances(form, right, given: Given, dtype: torch.dtype = torch.bfloat16, exact: torch.dtype = torch.float32):
    """Of a form's outputs and gradients from those of the right form, computed in `exact`."""
    a, b = found(form, given, dtype), found(right, given, exact)
    return {name: distance(a[name], b[name]) for name in b}


def changed(given: Given, times: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """How many numbers of outputs and gradients are others in any of so many further calls with the same inputs. What a
    kernel would read and none has written is NaN meanwhile."""
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = True
        first = found(kernel_momentum, given, dtype)
        numbers = {name: int((~x.isfinite()).sum()) for name, x in first.items()}
        for _ in range(times):
            for name, x in found(kernel_momentum, given, dtype).items():
                numbers[name] += int((x != first[name]).sum())
        return numbers
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class TestOnAGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("gates", GATES)
    def test_the_same_bits_in_every_run(self, gates):
        assert not any(changed(given(MODEL, gates), 20).values())

    @pytest.mark.parametrize("T", [1, 63, 65, 1000, 2047])
    def test_the_same_bits_at_odd_lengths(self, T):
        assert not any(changed(given((3, T, 4, 128), documents=100), 20).values())

    @pytest.mark.parametrize("gates", GATES)
    def test_gradients_are_the_chunked_forms(self, gates):
        """Those by the gates are sums that cancel. Where gates are shut or open they are next to nothing, beside the
        rounding of what they are the difference of, and not compared."""
        found = distances(kernel_momentum, chunked_momentum, given(MODEL, gates))
        by_gates = {name: found.pop(name).whole for name in ("log_momentum", "log_decay")}
        assert all(x.whole < 5e-3 for x in found.values()), "\n".join(f"{name} {x}" for name, x in found.items())
        if gates in ("usual", "decays near 0", "large steps"):
            assert max(by_gates.values()) < 4e-2, by_gates

    @pytest.mark.parametrize("K", [16, 32, 48, 64])
    def test_narrow_memories(self, K):
        """Those of 16 were wrong where the tokens' gradient had all their channels in one part."""
        case = given((8, 500, 3, K), documents=100)
        assert not any(changed(case, 8).values())
        found = distances(kernel_momentum, chunked_momentum, case)
        by_gates = [found.pop(name).whole for name in ("log_momentum", "log_decay")]
        assert all(x.whole < 5e-3 for x in found.values()), "\n".join(f"{name} {x}" for name, x in found.items())
        assert max(by_gates) < 4e-2, by_gates

    @pytest.mark.parametrize("T", [40, 64])
    def test_one_chunk_of_narrow_memories(self, T):
        """A segment of titans_mac. Where Triton knew that there is one chunk, it made no loop of the scans, and they
        ended in an illegal memory access."""
        case = given((8, T, 3, 32))
        assert not any(changed(case, 8).values())
        assert all(x.whole < 5e-3 for x in distances(kernel_momentum, chunked_momentum, case).values())
