"""Which numbers must not be rounded to the compute dtype: gates, decays, step sizes, memories, norms and sums."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: half precision is widened, float32 and float64 stay what they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which a memory is computed from these: float64 where one of them is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
