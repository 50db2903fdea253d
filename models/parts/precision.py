"""Which numbers must not be rounded to the compute dtype: gates, decays, step sizes, memories, norms and sums; and
which need more digits than those."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
NORM_EPS = 1e-6  # added to the variance in the layer norms of inner networks
NOTHING = 1e-12  # of a squared error: below it there is nothing to correct


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: half precision is widened, float32 and float64 stay what they are."""
    return x.float() if x.dtype in HALF else x


def product_dtype(x: Tensor) -> torch.dtype:
    """That of a product with x: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def uncached(device: torch.device) -> AbstractContextManager[None]:
    """Autocast as it is, but with no copies of weights kept: for what reads each weight a few times."""
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which a memory is computed from these: float64 where one of them is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums along a row whose differences are wanted: float64, but on MPS, which has none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def doubled_dtype(device: torch.device, *dtypes: torch.dtype) -> torch.dtype:
    """The dtype for what squares the condition number of numbers in these, as normal equations do: twice their digits.

    Float64 where one of them is; float32 where one has 16 bits, or autocast computes in 16 bits; else float64, but on
    MPS float32, since it has no float64.
    """
    if torch.float64 in dtypes:
        return torch.float64
    half = any(dtype in HALF for dtype in dtypes) or torch.is_autocast_enabled(device.type)
    return torch.float32 if half or device.type == "mps" else torch.float64
