"""Accuracy at the test points of a task: sets beside the validation set, longer or harder ones, each with its name."""

from __future__ import annotations

from torch import Tensor

RANGES = 16  # of positions, equally long


def metrics(sums: dict[str, Tensor], by_position: bool) -> dict[str, float]:
    """validation/accuracy_on/NAME, and with /FIRST-LAST behind it for each range of positions that has targets. sums:
    of each point nats, targets and right answers by position, [3, T].
    """
    found = {}
    for name, (_, count, right) in sums.items():
        where = f"validation/accuracy_on/{name}"
        found[where] = (right.sum() / count.sum()).item()
        for first, last in ranges(len(count)) if by_position else ():
            if part := count[first:last].sum().item():
                found[f"{where}/{first}-{last - 1}"] = right[first:last].sum().item() / part
    return found


def ranges(length: int) -> list[tuple[int, int]]:
    """Positions in RANGES ranges, the last of which may be shorter."""
    size = -(-length // RANGES)
    return [(first, min(first + size, length)) for first in range(0, length, size)]
