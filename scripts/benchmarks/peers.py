"""Peers: fla's own operators as they come, with their own scale of the query, 1/sqrt(K), and others' modules.

No model calls them from here: models/kernels/fla.py is where they are used, under this repository's conventions. Each
operator takes q, k, v [B, T, H, K], log_decay and step_size [B, T, H].
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("FLA_FLASH_QLA", "0")  # where FlashQLA is installed fla calls it by itself, and would be it


def linear_attn(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(q, k, v, normalize=False, output_final_state=True)[0]


def retention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.retention import chunk_retention

    return chunk_retention(q, k, v, output_final_state=True)[0]


def gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, _per_channel(log_decay, k), output_final_state=True)[0]


def simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g=log_decay, output_final_state=True)[0]


def delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(q, k, v, step_size, output_final_state=True)[0]


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, log_decay, step_size, output_final_state=True)[0]


def flash_qla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    """FlashQLA's gated delta rule, of keys and values 128 wide; where it is installed."""
    from flash_qla import chunk_gated_delta_rule

    scale = q.shape[-1] ** -0.5
    return chunk_gated_delta_rule(q, k, v, log_decay, step_size, scale=scale, output_final_state=True)[0]


def kda(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, _per_channel(log_decay, k), step_size, output_final_state=True)[0]


def comba(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.comba import chunk_comba

    return chunk_comba(q, k, v, k, log_decay, step_size, output_final_state=True)[0]


def gated_delta_product(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    """Two steps a token, the same pair twice."""
    from fla.ops.gated_delta_product import chunk_gated_delta_product

    k, v, step_size = (x.repeat_interleave(2, dim=1) for x in (k, v, step_size))
    return chunk_gated_delta_product(q, k, v, log_decay, step_size, num_householder=2, output_final_state=True)[0]


def mesa_net(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    """30 steps of conjugate gradients, ridge 1."""
    from fla.ops.mesa_net import chunk_mesa_net

    ridge = torch.ones(k.shape[2:], device=k.device)
    return chunk_mesa_net(q, k, v, log_decay, step_size, ridge, output_final_state=True)[0]


def momentum_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    from fla.ops.momentum_delta_rule import chunk_momentum_delta_rule

    log_momentum = torch.full_like(step_size, -0.1)
    return chunk_momentum_delta_rule(
        q, k, v, log_decay, log_momentum, eta=step_size, output_final_state=True, use_qk_l2norm_in_kernel=False
    )[0]


def ttt_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Another function than the published layer's: models/regression/deep/ttt.py, Others."""
    from fla.ops.ttt import chunk_ttt_linear

    H, V = v.shape[2:]
    weight, bias = torch.ones(H, V, device=v.device, dtype=v.dtype), torch.zeros(H, V, device=v.device, dtype=v.dtype)
    step_size = torch.full((*v.shape[:3], 1), 1 / V, device=v.device, dtype=v.dtype)
    return chunk_ttt_linear(q, k, v, weight, bias, step_size, chunk_size=16, output_final_state=True)[0]


OF_PRESETS = {
    "linear": linear_attn,
    "retnet": retention,
    "gla": gla,
    "mamba2": simple_gla,
    "deltanet": delta_rule,
    "gated_delta": gated_delta_rule,
    "kda": kda,
    "leaky_lms": comba,
    "delta_product": gated_delta_product,
    "mesa": mesa_net,
    "titans": momentum_delta_rule,
}


def momentum_delta_formula(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_momentum: Tensor, log_decay: Tensor, chunk: int = 64
) -> Tensor:
    """models/regression/linear/momentum.py's o for grad_batch 1 by fla's formula, in float32: the function beneath
    chunk_momentum_delta_rule, which refuses float32 itself. Plain PyTorch, on any device.

    Its coefficients are exp(.. - log of a cumulated momentum) times 1 - exp(..): the first grows without bound as the
    momentum falls, the second cancels. scripts/momentum_accuracy.py prints what is left.
    """
    from fla.ops.momentum_delta_rule.naive import chunk_momentum_delta_rule_ref

    gates = {"log_alpha": log_decay, "log_mu": log_momentum, "beta": torch.ones_like(step_size), "eta": step_size}
    return chunk_momentum_delta_rule_ref(q, k, v, k, **gates, scale=1.0, chunk_size=chunk)[0]


def transformers_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    """transformers' chunked gated delta rule in PyTorch."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    function = modeling_qwen3_next.torch_chunk_gated_delta_rule
    while hasattr(function, "__wrapped__"):  # the wrapper takes fla where it is installed, even without a GPU
        function = function.__wrapped__
    return function(q, k, v, log_decay, step_size, output_final_state=True)[0]


def fla_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As models/loss.py's sum_nats, like the two below: of one dtype all through."""
    from fla.modules import FusedLinearCrossEntropyLoss

    return FusedLinearCrossEntropyLoss(reduction="sum")(hidden, targets, weight)


def torch_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(weight, hidden, targets)


def gated_mlp(hidden_size: int, inner_size: int) -> nn.Module:
    """fla's SwiGLU layer, whose second half is fused with the output projection and keeps no h either."""
    from fla.modules import GatedMLP

    return GatedMLP(hidden_size=hidden_size, intermediate_size=inner_size, fuse_swiglu=True)


def titans_memory(hidden_size: int, num_heads: int, grad_batch: int | None, chunk: int = 64) -> nn.Module:
    """titans-pytorch's layer with a deep memory, x [B, T, D] to (o [B, T, D], state): heads of K = V = D / H numbers.

    For chunks c of C tokens, with eta and a from the mean of a chunk's inputs and theta from each token's,
        S_c = eta_c S_{c-1} - sum_i theta_i dl_i/dM (R) ,    M_c = a_c M_{c-1} + S_c ,    l = ||v - f(k)||^2 / V ,
        f(x) = LN(gelu(x W_1) W_2) + x ,    o_t = f(q_t) with the M of the last chunk complete at t ,
    where M is W_1 [K, 4 K], W_2 and the scale of LN, and R the M after every `grad_batch` tokens; None: M_0 for all, so
    that no chunk's gradient knows of another. theta is at most 1 / C: by the package's default, 1, M overflows where R
    moves. Ours has gates per token, reads the writes of its own chunk, and fades to M_0; it has silu and neither LN nor
    + x, but a convolution and keys of length one. Here every M_c is written to memory: T / C of them for a head.
    """
    from titans_pytorch import MemoryMLP, NeuralMemory

    # on a GPU its associative scan is TorchScript, whose fuser can't compile what it makes of autocast (torch 2.11)
    torch._C._jit_set_texpr_fuser_enabled(False)
    K = hidden_size // num_heads
    return NeuralMemory(
        dim=hidden_size,
        heads=num_heads,
        dim_head=K,
        chunk_size=chunk,
        batch_size=grad_batch,
        model=MemoryMLP(K, depth=2, expansion_factor=4.0),
        default_step_transform_max_lr=1 / chunk,
    )


def _per_channel(log_decay: Tensor, k: Tensor) -> Tensor:
    return log_decay.unsqueeze(-1).expand(k.shape).contiguous()


def short_convolutions(channels: int, width: int) -> nn.Module:
    """Of q, k, v and the gate, [B, T, channels] each: fla's convolutions with SiLU, and q and k at length one in heads
    of 128, as its Gated DeltaNet has them; the gate's SiLU is torch's."""
    from fla.modules import ShortConvolution
    from fla.modules.l2norm import l2norm

    class Convolutions(nn.Module):
        """(q, k, v, gate) to what the memory is given of them."""

        def __init__(self) -> None:
            super().__init__()
            made = (ShortConvolution(channels, width, activation="silu") for _ in range(3))
            self.convolutions = nn.ModuleList(made)

        def forward(self, *row: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (layer(x)[0] for layer, x in zip(self.convolutions, row[:3], strict=True))
            q, k = (l2norm(x.unflatten(-1, (-1, 128))) for x in (q, k))
            return q, k, v, F.silu(row[3])

    return Convolutions().to("cuda")
