"""In-context regression: the functions are what they say, and least squares finds those that are linear."""

from __future__ import annotations

import numpy as np
import pytest

from data.regression import FUNCTIONS, InContextRegression, normal
from data.text import IGNORE

D, PAIRS = 4, 20


def drawn(function: str, count: int = 400, **settings) -> tuple[np.ndarray, np.ndarray]:
    """x [N, n, D] and y [N, n] of training, out of the tokens."""
    samples = InContextRegression(2 * PAIRS, function, D, **settings).train_samples().__getitems__(range(count))
    tokens, labels = samples["input_ids"].numpy(), samples["labels"].numpy()
    assert tokens.dtype == labels.dtype == np.float32 and tokens.shape == (count, 2 * PAIRS, 1 + D)
    assert not tokens[:, 0::2, 0].any() and not tokens[:, 1::2, 1:].any() and (labels[:, 1::2] == IGNORE).all()
    assert (labels[:, 0::2] == tokens[:, 1::2, 0]).all(), "the answer is the token behind"
    return tokens[:, 0::2, 1:].astype(float), labels[:, 0::2].astype(float)


def left(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What least squares of each sequence leaves."""
    return np.array([np.abs(b - a @ np.linalg.lstsq(a, b, rcond=None)[0]).max() for a, b in zip(x, y, strict=True)])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_are_what_they_say(function):
    x, y = drawn(function)
    variance = x.reshape(-1, D).var(0)
    assert y.var() == pytest.approx(1, abs=0.15) and variance.mean() == pytest.approx(1, abs=0.1)
    if function == "anisotropic":
        assert variance / variance[0] == pytest.approx(1 / np.arange(1, D + 1), rel=0.1)
    if function in ("linear", "anisotropic"):
        assert left(x, y).max() < 1e-4
    elif function == "parabola":
        assert left(x**2 - 1, y).max() < 1e-4 and np.median(left(x, y)) > 0.5
    elif function == "switching":
        quarter = PAIRS // 4
        assert left(x[:, :quarter], y[:, :quarter]).max() < 1e-4 and left(x[:, -quarter:], y[:, -quarter:]).max() < 1e-4
        assert np.median(left(x, y)) > 0.5
    else:  # two linear functions: some plane tells them apart, and one does not do
        assert np.median(left(x, y)) > 0.3


def test_sequences_depend_on_seed_split_and_index_alone():
    task = InContextRegression(16, "linear", D, noise=0.1, test_length=32)
    one = task.train_samples()
    assert one[7]["labels"].equal(one.__getitems__([2, 7])["labels"][1])
    others = [one[8], task.validation_samples()[7], InContextRegression(16, "linear", D, seed=1).train_samples()[7]]
    assert not any(one[7]["labels"].equal(other["labels"]) for other in others)
    assert task.test_points()["longer"][0]["input_ids"].shape == (32, 1 + D) and task.chance is None
    assert task.targets_per_token == (one[0]["labels"] != IGNORE).float().mean() and task.vocab_size == 1 + D
    x, y = drawn("linear", noise=0.1)
    assert 0.1 < np.median(left(x, y)) < 0.3
    u = np.array([0.0, 0.5, 0.975])
    assert np.isfinite(normal(u)).all() and normal(u)[1:] == pytest.approx([0, 1.96], abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "cubic"}, r"data.function=cubic is not one of linear, anisotropic"),
        ({"seq_len": 15}, r"seq_len=15 must be even, two tokens a pair"),
        ({"noise": -1}, r"data.noise=-1 must be at least 0"),
        ({"size": 0}, r"data.size=0 must be a whole number from 1 on"),
    ],
)
def test_errors_name_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        InContextRegression(**{"seq_len": 16, "function": "linear"} | settings)
