"""Definitions of ours beside fla's references in plain PyTorch (naive.py of its operators), float32."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.kernels.interpreter import run_interpreted

CODE = """
import json, torch, torch.nn.functional as F
from fla.ops.comba.naive import naive_recurrent_comba
from fla.ops.deltaformer.naive import naive_deltaformer_attn
from fla.ops.gdn2.naive import naive_recurrent_gdn2
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.precond_gated_delta_rule.naive import naive_recurrent_precond_gated_delta_rule
from fla.ops.wall_attn.naive import naive_wall_attn
from models.parts.sizes import Sizes
from models.regression.linear.delta import recurrent_delta
from models.regression.linear.erasing import recurrent_rwkv7
from models.regression.linear.preconditioned import recurrent_curvature, squashed
from models.regression.local.deltaformer import recurrent_corrected
from models.regression.local.pairs import Pairs, View
from models.regression.local.wall import recurrent_wall

B, T, H, K, V = 2, 24, 2, 8, 8
torch.manual_seed(0)
q, k, v, x = (torch.randn(B, T, H, n) for n in (K, K, V, K))
q, k, x = (F.normalize(y, dim=-1) for y in (q, k, x))
b, w, gates = (torch.rand(B, T, H, n) for n in (K, V, K))
step, one, log_decay, logs = torch.rand(B, T, H), torch.ones(B, T, H), -torch.rand(B, T, H), -gates
heads = lambda *tensors: [y.transpose(1, 2) for y in tensors]

found = {
    "gdn2": (
        recurrent_delta(q, b * k, w * v, one, logs, write_key=k)[0],
        naive_recurrent_gdn2(q, k, v, logs, b, w, scale=1.0)[0],
    ),
    "comba": (
        recurrent_delta(q, 0.7 * k, v, step, log_decay, write_key=k)[0],
        naive_recurrent_comba(q, k, v, 0.7 * k, step, log_decay, scale=1.0)[0],
    ),
    "rwkv7": (
        recurrent_rwkv7(q, k, v, x, gates, logs)[0],
        dplr_recurrence(*heads(K**0.5 * q, k, v, -x, gates * x, logs))[0].transpose(1, 2),
    ),
}
before, _ = recurrent_curvature(step.unsqueeze(-1) * k.square(), log_decay, torch.zeros(B, H, K))
P = squashed(before + step.unsqueeze(-1) * k.square(), torch.full((H, 1), -0.2), 1.5)
theirs = naive_recurrent_precond_gated_delta_rule(q, k, v, log_decay, log_decay / 2, step, one / 2, scale=1.0)
found["pgdn"] = recurrent_delta(q, k, v, one / 2, log_decay / 2, write_key=k * P)[0], theirs[0]
keys, values, steps = heads(k, v, step.unsqueeze(-1))
beta = torch.full((H, 1, 1), K**-0.5)
u = recurrent_corrected(keys, values, steps, beta, View(), Pairs(keys[:, :, :0], values[:, :, :0]))
read = F.scaled_dot_product_attention(keys, keys, u, is_causal=True).transpose(1, 2)
found["deltaformer"] = read, naive_deltaformer_attn(k, k, v, step)  # at q = k
queries, age = heads(q, -logs.cumsum(1))
ours = recurrent_wall(queries, age, keys, age, values, torch.ones(H, 1, 1), View()).transpose(1, 2)
found["wall"] = ours, naive_wall_attn(q, k, v, logs, scale=1.0)
print("FOUND", json.dumps({name: (a - b).abs().max().item() for name, (a, b) in found.items()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla")
def test_definitions_are_those_of_fla():
    found = json.loads(run_interpreted(CODE).split("FOUND")[1])
    assert len(found) == 6 and all(difference < 1e-5 for difference in found.values()), found
