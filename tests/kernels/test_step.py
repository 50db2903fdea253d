"""The kernels of one token against the mixer itself, state by state."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch

from models.block import Block, SwiGLU
from models.cache import map_tensors
from models.decoding.fused import FusedBlock, FusedMixer, refusal
from tests.kernels.interpreter import run_interpreted
from tests.laws.presets import HIDDEN, inputs, mixer, part, tensors

CASES = {
    "gated_delta": ("gated_delta", {}),
    "no decay, no bias": ("deltanet", {"regressor__bias": False, "output_gate": "sigmoid"}),
    "steps of two, grouped keys": ("gated_delta", {"regressor__negative_eigenvalues": True, "num_key_heads": 1}),
    "no norms, no gate": ("gated_delta", {"qk_norm": "none", "feature_norm": "none", "output_norm": False,
                                          "output_gate": "none", "activation": "none"}),
    "ragged": ("gated_delta", {"key_dim": 20, "value_dim": 44, "conv_size": 2}),
    "titans": ("titans", {}),
    "titans, free": ("titans", {"regressor__gates": "free"}),
    "titans, ragged": ("titans", {"key_dim": 20, "value_dim": 44, "decay": part("decay", "none")}),
}  # fmt: skip


def errors(case: str, device: str, dtype: torch.dtype = torch.float32, tokens: int = 2) -> list[float]:
    """The largest differences of outputs and states after `tokens` steps, beside the largest number, at least 1."""
    preset, settings = CASES[case]
    m = mixer(preset, dtype=torch.float32, **settings)
    block = Block(HIDDEN, m, SwiGLU(HIDDEN, 24), 1e-6).to(device, dtype)
    x = inputs(2, 9 + tokens, torch.float32).to(device, dtype)
    with torch.no_grad():
        *_, state = block(x[:, :9])
        fused, ours = FusedBlock(block, x.device, dtype), map_tensors(state, torch.clone)
        assert isinstance(fused.mixer, FusedMixer), fused.refusal
        for t in range(9, 9 + tokens):
            *x_and_y, state = block(x[:, t : t + 1], None, state)
            wanted = sum(x_and_y)
            x_and_y = fused(x[:, t : t + 1], None, ours)
            found, after = sum(x_and_y[:2]), x_and_y[2]
            assert all(a is b for a, b in zip(tensors(after), tensors(ours), strict=True))
    pairs = zip([found, *tensors(after)], [wanted, *tensors(state)], strict=True)
    return [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs]


@pytest.mark.slow
def test_8_one_token_by_the_kernels_is_one_token():
    code = """
    import json
    from models.kernels import step
    from tests.kernels.test_step import *
    from tests.laws.presets import PRESETS
    PRESETS[:] = {preset for preset, _ in CASES.values()}
    found = {case: max(errors(case, "cpu")) for case in ("gated_delta", "titans, ragged")}
    step.FEW = 0  # torch's products from here on
    print("FOUND", json.dumps(found | {case: max(errors(case, "cpu")) for case in CASES.keys() - found}))
    """
    found = json.loads(run_interpreted(textwrap.dedent(code), fla=False).split("FOUND")[1])
    assert found.keys() == CASES.keys() and all(error < 1e-5 for error in found.values()), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-2), (torch.bfloat16, 5e-2)], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_8_one_token_by_the_kernels_is_one_token_on_a_gpu(case, dtype, tolerance):
    assert max(errors(case, "cuda", dtype)) < tolerance


def test_what_the_kernels_do_not_know_is_left_to_the_layers():
    for preset, why in {"kda": "no Delta with", "softmax": "no Softmax", "titans_mag": "more than a mixer"}.items():
        assert why in refusal(mixer(preset), torch.device("cuda"), torch.float32)
    hooked = mixer("gated_delta")
    hooked.projection.register_forward_hook(lambda *_: None)
    assert "more than its weight" in refusal(hooked, torch.device("cuda"), torch.float32)
