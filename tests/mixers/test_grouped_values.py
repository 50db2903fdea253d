"""More heads of values than of keys, as Qwen3-Next has them. (Beside its layer: tests/test_published.py.)"""

from __future__ import annotations

import pytest
import torch

from tests.laws.presets import inputs, mixer, outcome, tensors

K, V = 8, 16


@pytest.mark.parametrize("splits", [(1, 2, 3), (5, 6, 20)])
def test_grouped_value_heads_go_on_from_a_state(splits):
    """Any split into calls; and what can't be."""
    m = mixer("gated_delta", num_heads=4, num_key_heads=2, key_dim=K, value_dim=V)
    for whole, parts in zip(outcome(m, inputs(2, 23)), outcome(m, inputs(2, 23), splits), strict=True):
        torch.testing.assert_close(whole, parts)
    assert m.state_size(23) == sum(t.numel() for t in tensors(m(inputs(1, 23))[1][:2]))
    for preset, settings in (
        ("gated_delta", {"num_heads": 4, "num_key_heads": 3}),
        ("softmax", {"num_heads": 4, "num_key_heads": 2, "num_kv_heads": 2}),
        ("memory_mosaic", {"num_heads": 2, "num_key_heads": 1}),
    ):
        with pytest.raises(ValueError, match=r"num_key_heads=\d: it must divide num_heads=\d, and stand beside"):
            mixer(preset, **settings)
