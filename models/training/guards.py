"""What training does about numbers that are not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.training.run import RunError
from models.training.summary import say

WINDOW = 128  # losses that the next one is compared with
FEWEST = 32  # ... and how many there must be for that
LEAST = 0.1  # nats a token above the mean, for a spike to be told: near zero any batch is many deviations off


class Guard:
    """Leaves out the steps that would spoil the weights, and points at those that look as if something did.

    max_skipped: a step whose loss or gradient is not finite is left out: weights and optimizer stay as they are, the
        step counts, and the batch is not tried again. After more than this many in a row the run ends.
    spike_score: how many standard deviations above the mean of the last 128 losses a loss may lie before a line is
        printed about it; nothing else is done. null for never.

    Its counters are part of a checkpoint.
    """

    def __init__(self, max_skipped: int = 10, spike_score: float | None = 6.0) -> None:
        if max_skipped < 0:
            raise ValueError(f"guard.max_skipped={max_skipped} must not be negative; 0 ends the run at the first one")
        if spike_score is not None and spike_score <= 0:
            raise ValueError(f"guard.spike_score={spike_score} must be positive, or null for none")
        self.max_skipped, self.spike_score = max_skipped, spike_score
        self.skipped = self.in_a_row = 0
        self.score = 0.0  # of the last loss
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def accepts(self, step: int, loss: float, norm: float, parameters: Iterable[tuple[str, Tensor]]) -> bool:
        """Whether the step may be taken. All ranks ask, with the same numbers. Raises RunError after too many noes."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            self._watch(step, loss)
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.score = 0.0
        culprits = not_finite(parameters)
        found = f"step {step:,}: the loss is {loss:.4g}, the norm of the gradient {norm:.4g}; not finite: {culprits}"
        if self.in_a_row > self.max_skipped:
            raise RunError(f"{found}. That was {self.in_a_row} in a row, and guard.max_skipped={self.max_skipped}")
        say(f"warning: {found}. The step is left out, {self.in_a_row} in a row of at most {self.max_skipped}")
        return False

    def _watch(self, step: int, loss: float) -> None:
        self.score = 0.0
        if len(self.losses) >= FEWEST:
            mean = math.fsum(self.losses) / len(self.losses)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self.losses) / len(self.losses))
            self.score = (loss - mean) / max(deviation, 1e-12)
            if self.spike_score is not None and self.score > self.spike_score and loss - mean > LEAST:
                say(
                    f"warning: step {step:,}: the loss is {loss:.4g}, {self.score:.1f} standard deviations above the "
                    f"{mean:.4g} of the {len(self.losses)} before"
                )
        self.losses.append(loss)

    def metrics(self) -> dict[str, float]:
        return {"train/skipped_steps": float(self.skipped), "train/spike_score": self.score}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.losses = deque(state["losses"], maxlen=WINDOW)


def not_finite(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Names the parameters, and the gradients, that hold NaN or infinity on any rank, and the values of which."""
    pairs = [pair for name, p in parameters for pair in ((name, p), (f"the gradient of {name}", p.grad))]
    tensors = [(name, x) for name, x in pairs if x is not None]
    flags = torch.stack([_bad(x) for _, x in tensors])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(flags)
    names = [name for (name, x), flag in zip(tensors, flags.tolist(), strict=True) if flag]
    if not names:
        return "no parameter and no gradient"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more of {len(tensors)}" if len(names) > 6 else "")


def _bad(x: Tensor) -> Tensor:
    x = x.to_local() if isinstance(x, DTensor) else x
    return (~x.detach().isfinite().all()).float()
