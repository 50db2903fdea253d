"""What the norm after the memory adds to the mean square of a read, beside the layers whose weights people copy.

Ports of such layers went wrong by an eps or by the scale of the queries:
https://github.com/ml-explore/mlx-lm/issues/1798, https://github.com/NeuraLegion/shainet/pull/176,
https://github.com/paiml/aprender/pull/1606.
"""

from __future__ import annotations

import pytest
import torch
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


@pytest.mark.slow
def test_a_layer_of_qwen3_next_can_be_copied(monkeypatch):
    """Small inputs, whose reads its eps of 1e-6 weakens: K times the eps is a few parts of a hundred off. It takes its
    sums in float32.
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_next/modeling_qwen3_next.py
    """
    from transformers.models.qwen3_next import modeling_qwen3_next as module
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

    plain = module.torch_chunk_gated_delta_rule
    while hasattr(plain, "__wrapped__"):  # the wrapper takes fla where it is installed, even without a GPU
        plain = plain.__wrapped__
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", plain)
    widths = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "hidden_size": 32}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    theirs = module.Qwen3NextGatedDeltaNet(Qwen3NextConfig(num_hidden_layers=1, **widths, **heads), 0).float()
    ours = mixer("gated_delta", dtype=torch.float32, output_norm_eps=1e-6, **SIZES)
    q, k, v, z = theirs.in_proj_qkvz.weight.data.unflatten(0, (2, -1)).split([16] * 4, dim=1)
    b, a = theirs.in_proj_ba.weight.data.unflatten(0, (2, 2)).unbind(1)
    ours.load_state_dict(
        {
            "projection.weight": torch.cat([x.flatten(0, 1) for x in (q, k, v, z)]),
            "convolution.weight": theirs.conv1d.weight.data.squeeze(1),
            "regressor.step_size.weight": b,
            "regressor.step_size.bias": torch.zeros(2),
            "decay.projection.weight": a,
            "decay.log_rate": theirs.A_log.data,
            "decay.bias": theirs.dt_bias.data,
            "output_norm.weight": theirs.norm.weight.data,
            "output.weight": theirs.out_proj.weight.data,
        }
    )
    x = inputs(2, 70, torch.float32) / 30
    with torch.no_grad():
        expected, (found, _) = theirs(x), ours(x)
        ours.output_norm.eps = 1e-6
        other, _ = ours(x)
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (other - expected).abs().max() > 1e-2 * scale, "the test would not see another eps"


def test_a_run_from_before_is_not_changed_without_a_word():
    """Its config has no such setting: the model keeps its eps, and a run that goes on is told of the difference."""
    node = {key: value for key, value in recipe("gated_delta").items() if key != "output_norm_eps"}
    assert "output_norm_eps" not in node and node["output_norm"] is True
    now = dict(composed("gated_delta").model.mixers.main)
    before = {key: value for key, value in now.items() if key != "output_norm_eps"}
    assert difference({"model": before}, {"model": now}).strip() == "model.output_norm_eps: (absent) before, 1e-05 now"
    old = composed("gated_delta", "~model.mixers.main.output_norm_eps").model.mixers.main
    assert difference({"model": before}, {"model": dict(old)}) == ""
