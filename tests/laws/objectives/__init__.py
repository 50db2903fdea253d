"""What each preset claims to minimise, or to step along: checked by other means than the code's own, torch.linalg.lstsq
or autograd. A module a family; `states` says for which presets a check speaks.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from models.regression.regressor import Regressor


class Call(NamedTuple):
    """What a regressor was given and what it gave back, for a batch of one."""

    regressor: Regressor
    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    o: Tensor


Check = Callable[[Call], None]
CHECKS: dict[str, Check] = {}


def states(*presets: str) -> Callable[[Check], Check]:
    """The function below asserts what these presets' regressors compute."""

    def register(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(presets, check))
        return check

    return register


for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
