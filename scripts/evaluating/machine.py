"""Where models are evaluated."""

from __future__ import annotations

import torch

from conf.schema import default_precision


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """The GPU where there is one, and the dtype of the products that training takes by itself there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.bfloat16 if "bf16" in default_precision() else torch.float32
