"""Numbers that others have published, beside which ours stand. One source a table: papers differ in their data, models
and tuning, so that two sources never stand in one column.
"""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """name: who, and where in it.  of: by our name of a mixer, a number for each of `columns`."""

    name: str
    columns: tuple[str, ...]
    of: dict[str, tuple[float | None, ...]]


# Accuracy in percent. Their first number is of recall and of noisy recall alike.
MAD = Source(
    "MesaNet (von Oswald et al. 2025, arXiv 2506.05233), table 9",
    ("mad_recall", "mad_noisy_recall", "mad_fuzzy_recall", "mad_memorization", "mad_copying", "mad_compression"),
    {
        "mamba2": (100, 100, 51.2, 42.0, 95.4, 41.3),
        "gla": (100, 100, 39.0, 82.5, 96.1, 42.3),
        "deltanet": (100, 100, 55.5, 40.8, 98.8, 43.3),
        "gated_delta": (100, 100, 32.7, 81.7, 95.7, 45.0),
        "mesa": (100, 100, 58.5, 77.2, 99.2, 45.4),
        "softmax": (100, 100, 48.6, 84.7, 96.0, 49.5),
    },
)

# (accuracy - chance) / (1 - chance), the best of three seeds; our names say the range of the eigenvalues.
STATE_TRACKING = Source(
    "Grazzi et al. 2025 (arXiv 2411.12537), table 3",
    ("parity", "modular_arithmetic", "modular_brackets"),
    {
        "softmax": (0.022, 0.031, 0.067),
        "deltanet [0, 1]": (0.017, 0.314, 0.194),
        "deltanet [-1, 1]": (1.0, 0.971, 0.260),
    },
)

# Places among the mixers that we have too, by validation perplexity at 400 million parameters and 15 billion tokens of
# SlimPajama: 13.44, 13.48, 13.64, 13.69, 13.80, 13.95, 14.45, 14.69, 15.98, 23.36. A number is a control's window.
ORDER: tuple[str, ...] = ("mesa", "gated_delta", "softmax", "gla", "deltanet", "softmax 1024", "mamba2")
ORDER += ("softmax 256", "softmax 64", "softmax 4")
ABLATION = Source(
    "MesaNet (von Oswald et al. 2025, arXiv 2506.05233), table 10",
    ("place",),
    {name: (place,) for place, name in enumerate(ORDER, 1)},
)
