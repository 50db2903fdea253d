"""Kernels that are let through compile for an H100 and fit on it, seen without one."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from models.block import SwiGLU
from models.kernels import cross_entropy, swiglu
from scripts.compiled import PRESETS, SHARED, _faults, compiling, kernels_of

CASES = [
    ("titans", 256, torch.bfloat16),
    ("titans", 64, torch.float32),
    ("titans", 128, torch.bfloat16),
    ("titans", 64, torch.bfloat16, "grad_batch=16"),
    ("gated_delta", 128, torch.bfloat16),
    ("preconditioned_delta", 128, torch.bfloat16),
    ("titans_mlp", 64, torch.bfloat16),
    ("titans_mlp", 32, torch.float32),
    ("titans_mlp", 64, torch.float32, "grad_batch=32"),
    ("ttt_linear", 128, torch.bfloat16),
    ("ttt_mlp", 64, torch.bfloat16),
    ("ttt_mlp", 64, torch.float32),
    ("local_linear", 128, torch.bfloat16),
]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x).removeprefix("torch.") for x in case))
def test_kernels_fit_on_an_h100(case):
    found = kernels_of(*case)
    assert len(found) >= 2
    assert all(kernel.shared <= SHARED and kernel.registers <= 255 for kernel in found), "\n".join(map(str, found))
    assert not any(kernel.faults for kernel in found), "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, folder",
    [
        ("gated_delta", "delta"),
        ("kda", "channel_delta"),
        ("titans", "momentum"),
        ("preconditioned_delta", "momentum"),
    ],
)
def test_scans_of_many_heads_fit_where_they_say(preset, folder, monkeypatch):
    """A program of eight warps for all values of a head, beside what is compiled above."""
    launch = importlib.import_module(f"models.kernels.{folder}.launch")
    monkeypatch.setattr(launch, "many", lambda *_: True)
    scans = [kernel for kernel in kernels_of(preset, 128, torch.bfloat16) if kernel.name.startswith("scan")]
    assert [kernel.warps for kernel in scans] == [8, 8]
    fit = all(kernel.shared <= launch.WHOLE_SHARED and not kernel.faults for kernel in scans)
    assert fit, "\n".join(map(str, scans))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gated_delta", "kda"])
def test_first_passes_over_spans_leave_nothing_but_memories(preset, monkeypatch):
    """A multiprocessor has room for two programs of the one that has twice the columns."""
    monkeypatch.setattr(importlib.import_module("models.kernels.delta.launch"), "num_spans", lambda *_: 2)
    found = [kernel for kernel in kernels_of(preset, 128, torch.bfloat16) if kernel.name.startswith(("scan", "join"))]
    # both joins may need the same of a GPU, and are one then
    first, second, _, again = scans = [kernel for kernel in found if kernel.name != "join"]
    assert [kernel.name for kernel in scans] == ["scan"] * 2 + ["scan_gradient"] * 2 and 0 < len(found) - len(scans) < 3
    assert all(kernel.shared <= SHARED and not kernel.faults for kernel in found), "\n".join(map(str, found))
    assert not any(kernel.stack for kernel in found if kernel not in (second, again)), "\n".join(map(str, found))
    assert first.wgmma < second.wgmma and 2 * (first.shared + 1024) <= SHARED + 1024, first


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["titans", "preconditioned_delta"])
def test_narrow_memories_have_the_launches_of_64_channels(preset):
    """With shared memory for as many stages and products of the same sizes: of 16 channels by themselves the tokens'
    gradient was no loop, and wrong on a GPU."""
    found = [
        [(kernel.name, kernel.shared, kernel.mma, kernel.wgmma, kernel.faults) for kernel in kernels]
        for kernels in (kernels_of(preset, key_dim, torch.bfloat16) for key_dim in (16, 32, 64))
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_kernels_of_the_loss_and_of_the_feed_forward_layer_spill_nothing(dtype, monkeypatch):
    """Of a vocabulary that is a multiple of the block and of one that isn't."""
    monkeypatch.setattr(swiglu, "refusal", lambda *_: None)
    layer, y = SwiGLU(64, 148).to(dtype), torch.zeros(2, dtype=torch.int64)
    with compiling() as found:
        for V in (8192, 257):
            logits = cross_entropy.new_logits(layer.up.weight, 2, V)
            cross_entropy.nats_and_gradient(logits, y)
            cross_entropy.nats_and_likeliest(logits, y)
        layer(torch.randn(2, 64, dtype=dtype)).sum().backward()
    assert [kernel.name for kernel in found] == ["cross_entropy"] * 4 + ["gate", "gate_gradient"]
    assert all(kernel.stack == 0 and kernel.registers <= 128 for kernel in found), "\n".join(map(str, found))


def test_a_stack_pointer_that_is_taken_for_a_number_is_seen():
    """As ptxas wrote it where a tile's descriptor was to be: lines of a kernel that met an illegal address."""
    right = ["LDC R1, c[0x0][0x28]", "VIADD R1, R1, 0xfffffe20", "STL [R1+0x160], R183", "LDL.LU R214, [R1+0x4]"]
    wrong = ["IADD3 R16, P3, R1, 0x40, RZ", "IADD3.X R17, R1, -0x7fffffe0, RZ, P3, !PT"]
    assert [_faults(f"        /*0560*/                   {line} ;") for line in [*right, *wrong]] == [0] * 4 + [1] * 2


def test_what_has_no_kernels_says_so():
    with pytest.raises(ValueError, match="gla has no kernels of ours here: none were written"):
        kernels_of("gla", 64, torch.bfloat16)
    with pytest.raises(ValueError, match="mini-batches of 64 are wrong for vectors of 32"):
        kernels_of("titans_mlp", 32, torch.bfloat16)
    for preset in ("titans_mag", "hybrid", "lstm"):
        with pytest.raises(ValueError, match=f"{preset} is a memory beside attention, or none; ask for the preset of"):
            kernels_of(preset, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=r"grad_bach=3 is not a setting; did you mean .*\.grad_batch\?"):
        kernels_of("titans", 64, torch.bfloat16, "grad_bach=3")
    with pytest.raises(ValueError, match=r"^--key-dim=0 must be at least 1$"):
        kernels_of("titans", 0, torch.bfloat16)


def test_presets_are_those_of_models_published_ones_too():
    assert {"titans", "titans_published", "gated_delta_published"} <= set(PRESETS)
