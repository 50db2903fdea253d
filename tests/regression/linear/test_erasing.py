"""Rules taken apart, put together again: each member is the one it generalises where its extra parts say nothing."""

from __future__ import annotations

import pytest
import torch

from tests.laws.presets import inputs, largest_difference, mixer

X = inputs(2, 21)


def difference(found: torch.nn.Module, known: torch.nn.Module) -> float:
    """Of reads and memory: of two regressors in the shell of the second."""
    seen = []
    known.regressor.register_forward_hook(lambda module, args, result: seen.extend([args[0], result]))
    known(X)
    return largest_difference(list(found.regressor(seen[0])), list(seen[1]))


def test_gdn2_with_one_number_for_both_gates_is_kda():
    m, known = mixer("gdn2"), mixer("kda")
    with torch.no_grad():
        known.regressor.step_size.bias.zero_()
        for layer in (m.regressor.erase, m.regressor.write):
            channels = layer.weight.shape[0] // known.num_heads
            layer.weight.copy_(known.regressor.step_size.weight.repeat_interleave(channels, 0))
    assert difference(m, known) < 1e-12


@pytest.mark.parametrize("preset, early", [("leaky_lms", True), ("gated_delta", False)])
def test_comba_without_its_corrections_is_leaky_lms_or_gated_delta(preset, early):
    m, known = mixer("comba", regressor__gradient_before_decay=early), mixer(preset)
    m.regressor.step_size.load_state_dict(known.regressor.step_size.state_dict())
    with torch.no_grad():
        m.regressor.feedback.fill_(100.0)
        m.regressor.correction.zero_()
    assert difference(m, known) < 1e-12


def test_rwkv7_with_one_rate_for_all_channels_is_leaky_lms():
    """x = k, y = e k: the erased key and the written one are one, of length one."""
    m, known = mixer("rwkv7"), mixer("leaky_lms")
    rate, step = m.regressor.expansion, known.regressor.step_size
    with torch.no_grad():
        rate.weight.zero_()
        rate.bias.copy_(step.bias.repeat_interleave(known.key_dim))
        step.weight.zero_()
    assert difference(m, known) < 1e-5  # the norm of x adds 1e-6 to |k|^2


def test_refusals_name_the_setting():
    with pytest.raises(ValueError, match=r"regressor\.rank=0"):
        mixer("rwkv7", regressor__rank=0)
