"""How good a model is at the test points of a task: sets beside the validation set, longer or harder, with a name."""

from __future__ import annotations

from torch import Tensor

RANGES = 16  # of positions, equally long


def metrics(sums: dict[str, Tensor], by_position: bool) -> dict[str, float]:
    """validation/accuracy_on/NAME, and with /FIRST-LAST behind it for each range of positions that has targets; of a
    task without right answers validation/nats_on/NAME. sums: of each point nats, targets and, where there are some,
    right answers by position, [2 or 3, T].
    """
    found = {}
    for name, (nats, count, *right) in sums.items():
        where = f"validation/{'accuracy' if right else 'nats'}_on/{name}"
        total = right[0] if right else nats
        found[where] = (total.sum() / count.sum()).item()
        for first, last in ranges(len(count)) if by_position else ():
            if part := count[first:last].sum().item():
                found[f"{where}/{first}-{last - 1}"] = total[first:last].sum().item() / part
    return found


def ranges(length: int) -> list[tuple[int, int]]:
    """Positions in RANGES ranges, the last of which may be shorter."""
    size = -(-length // RANGES)
    return [(first, min(first + size, length)) for first in range(0, length, size)]
