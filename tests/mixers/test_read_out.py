"""What the norm after the memory adds to the mean square of a read. (Beside published layers: tests/test_published.py.)

Ports of such layers went wrong by an eps or by the scale of the queries:
https://github.com/ml-explore/mlx-lm/issues/1798, https://github.com/NeuraLegion/shainet/pull/176,
https://github.com/paiml/aprender/pull/1606.
"""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from models.training.run import difference
from scripts.recipes import composed
from tests.laws.presets import inputs, mixer, recipe

SIZES = {"num_heads": 2, "key_dim": 16, "value_dim": 16}


@pytest.mark.parametrize(("eps", "added"), [(1e-5, 16e-5), (None, 1e-6)])
def test_the_eps_is_that_of_reads_scaled_by_the_root_of_their_width(eps, added):
    m = mixer("gated_delta", output_norm_eps=eps, output_gate="none", output_projection=False, **SIZES)
    reads = []
    m.regressor.register_forward_hook(lambda module, args, result: reads.append(result[0]))
    y, _ = m(inputs(1, 9) / 10)
    o = reads[0]
    expected = o * (o.square().mean(-1, keepdim=True) + added).rsqrt()
    assert (y - expected.flatten(-2)).abs().max() < 1e-12
    if eps:
        assert (y - F.rms_norm(o / 4, (16,), eps=eps).flatten(-2)).abs().max() < 1e-12


def test_features_count_their_own_width():
    """fla scales by the width that the kernel sees, after the feature map."""
    m = mixer("gated_delta", features={"_target_": "models.parts.features.DPFP", "_partial_": True}, **SIZES)
    assert m.output_norm.eps == pytest.approx(1e-5 * m.features.width) and m.features.width > 16


def test_a_run_from_before_is_not_changed_without_a_word():
    """Its config has no such setting: the model keeps its eps, and a run that goes on is told of the difference."""
    node = {key: value for key, value in recipe("gated_delta").items() if key != "output_norm_eps"}
    assert "output_norm_eps" not in node and node["output_norm"] is True
    now = dict(composed("gated_delta").model.mixers.main)
    before = {key: value for key, value in now.items() if key != "output_norm_eps"}
    assert difference({"model": before}, {"model": now}).strip() == "model.output_norm_eps: (absent) before, 1e-05 now"
    old = composed("gated_delta", "~model.mixers.main.output_norm_eps").model.mixers.main
    assert difference({"model": before}, {"model": dict(old)}) == ""
