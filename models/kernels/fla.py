"""flash-linear-attention: what it can do here, and the calls. The only file of the models that imports fla, and only
inside functions (scripts/benchmarks/peers.py times it as it comes, scripts/exporting/fla_models.py makes its models).

fla 0.6.0 without Triton imports as an empty package, and with Triton but no GPU it imports and fails at the first call,
so neither is asked by importing it. Layout, log decays and float32 memories are this repository's own; the scale is
always passed (fla's default is 1/sqrt(K), here the mixer scales the query).
"""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import backend, tuning

# The kernels sum decays over 64 tokens in float32, and a large one takes the digits of the small ones after it: with 7
# documents in a chunk the error is 2e-5, with gates saturated at -1e4 it is 4e-3. exp(-32) = 1e-14 is nothing to
# float32 and leaves them be.
LEAST_LOG_DECAY = -32.0

INSTALLED = importlib.util.find_spec("fla") is not None  # looked up once: it is asked for in every call of a layer

# Where FlashQLA is installed fla calls it in place of its own kernel, without a word. It was not checked here with the
# decays that part documents, so it has to be asked for: FLA_FLASH_QLA=1.
FLASH_QLA = os.environ.setdefault("FLA_FLASH_QLA", "0") != "0" and importlib.util.find_spec("flash_qla") is not None

# Triton before 3.7.1 miscompiles fla's backward of a decay per head on Hopper; fla refuses it there (chunk_bwd_dqkwg).
BROKEN_ON_HOPPER = ((3, 4, 0), (3, 7, 1))


def refusal_linear(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why fla can't run linear attention here, or None if it can. dtype is that of q, k and v. Asked for each of fla's
    kernels before its first call: where they can run, they are tuned side by side from here on."""
    if not INSTALLED:
        return "flash-linear-attention is not installed"
    if (reason := backend.refusal(device, dtype)) is None:
        tuning.side_by_side()
    return reason


def route_linear(device: torch.device, decay_kind: str) -> str:
    """The kernel `linear` calls here, and why where it is not the obvious one."""
    if decay_kind == "channel":
        return "chunk_gla"
    if decay_kind != "none" and (broken := _broken_on_hopper(device)) is not None:
        return f"chunk_gla with the gate repeated over channels: {broken} gets the gradient of a gate per head wrong"
    return "chunk_simple_gla"


def linear(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """linear.py's map by fla's kernels. Arguments and results as recurrent_linear's; q, k, v are cast to v's dtype.

    In 16 bits fla's backward pass wants an even number of keys and values: others get one more of zeros.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    K, V = k.shape[-1], v.shape[-1]
    if K % 2 or V % 2:
        q, k, v = (F.pad(x, (0, x.shape[-1] % 2)) for x in (q, k, v))
        if log_decay is not None and log_decay.ndim == 4:
            log_decay = F.pad(log_decay, (0, K % 2))
        memory = None if memory is None else F.pad(memory, (0, V % 2, 0, K % 2))
        o, memory = linear(q, k, v, log_decay, memory)
        return o[..., :V], memory[..., :K, :V]
    options = {"scale": 1.0, "initial_state": None if memory is None else memory.float(), "output_final_state": True}
    kind = "none" if log_decay is None else "head" if log_decay.ndim == 3 else "channel"
    if log_decay is not None:
        log_decay = log_decay.float().clamp(min=LEAST_LOG_DECAY)
    if log_decay is None or route_linear(v.device, kind) == "chunk_simple_gla":
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla(q, k, v, g=log_decay, **options)
    from fla.ops.gla import chunk_gla

    if kind == "head":
        log_decay = log_decay.unsqueeze(-1)
    return chunk_gla(q, k, v, log_decay.expand_as(k).contiguous(), **options)


def refusal_gated_delta(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why fla can't run the (gated) delta rule here, or None if it can. dtype is that of q, k and v.

    On an H200 (fla 0.6.0, Triton 3.7.1, 300 tokens, keys 64 and 96 wide, values 16) the gradients by k, v and steps are
    wrong by all of their length in bfloat16; outputs are right, and so is all by Triton's interpreter in float16. That
    is Triton's fault with products of few columns (docs/kernels.md), which begins at 32, beside blocks of 64 rows.
    """
    if (reason := refusal_linear(device, dtype)) is not None:
        return reason
    if key_dim > 256:
        return f"fla's kernels take keys up to 256 wide, not {key_dim}"
    if dtype != torch.float32 and value_dim <= 32 < key_dim and _on_hopper(device):
        return f"on Hopper fla's gradient is wrong in 16 bits for values {value_dim} wide beside keys {key_dim} wide"
    if device.type == "cuda" and dtype == torch.float32 and key_dim > 64:
        return f"in float32 fla's kernels want more shared memory than an H100 has for keys {key_dim} wide; 64 fit"
    return None


def route_gated_delta(device: torch.device, decay_kind: str = "head", dtype: torch.dtype = torch.bfloat16) -> str:
    """The kernel `gated_delta` calls here, and why where it is not the obvious one."""
    if decay_kind == "channel":
        return "chunk_kda"
    if decay_kind == "none" and dtype != torch.float32:
        return "chunk_delta_rule"
    if (broken := _broken_on_hopper(device)) is not None:
        return f"chunk_kda with the gate repeated over channels: {broken} gets the gradient of a gate per head wrong"
    return "chunk_gated_delta_rule" + (", by FlashQLA where it can" if FLASH_QLA else "")


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """delta.py's map by fla's kernels. Arguments and results as recurrent_delta's; q, k, v are cast to one dtype, v's.

    Document boundaries come as FORGET in log_decay, not as cu_seqlens, whose number of documents is part of fla's
    autotuning keys.
    """
    q, k, step_size = q.to(v.dtype), k.to(v.dtype), step_size.float()
    options = {"scale": 1.0, "initial_state": None if memory is None else memory.float(), "output_final_state": True}
    kind = "none" if log_decay is None else "head" if log_decay.ndim == 3 else "channel"
    route = route_gated_delta(v.device, kind, v.dtype)
    if route == "chunk_delta_rule":
        from fla.ops.delta_rule import chunk_delta_rule

        return chunk_delta_rule(q, k, v, step_size, **options)
    log_decay = torch.zeros_like(step_size) if log_decay is None else log_decay.float().clamp(min=LEAST_LOG_DECAY)
    if route.startswith("chunk_gated_delta_rule"):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(q, k, v, log_decay, step_size, **options)
    from fla.ops.kda import chunk_kda

    log_decay = log_decay if kind == "channel" else log_decay.unsqueeze(-1)
    return chunk_kda(q, k, v, log_decay.expand_as(k).contiguous(), step_size, **options)


def gated_delta_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor,
    log_decay: Tensor | None = None,
    memory: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """erasing.py's GatedDelta2 by fla's kernels: S = S' + k^T (w * v - (b * k) S'). erase b and write w as k and v are,
    the rest as in gated_delta, by whose limits it goes."""
    from fla.ops.gdn2 import chunk_gdn2

    q, k, erase, write = (x.to(v.dtype) for x in (q, k, erase, write))
    options = {"scale": 1.0, "initial_state": None if memory is None else memory.float(), "output_final_state": True}
    return chunk_gdn2(q, k, v, _per_channel(log_decay, k), erase, write, **options)


def _per_channel(log_decay: Tensor | None, k: Tensor) -> Tensor:
    """Log decays [B, T, H, K] of any kind."""
    if log_decay is None:
        return torch.zeros_like(k, dtype=torch.float32)
    log_decay = log_decay.float().clamp(min=LEAST_LOG_DECAY)
    return (log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)).expand_as(k).contiguous()


def refusal_leaky_delta(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why fla can't run the delta rule with the gradient before the decay here, or None if it can.

    On an H100 (fla 0.6.0, Triton 3.7.1, keys of 16, 300 tokens) chunk_comba in bfloat16 is wrong by a third and then
    ends in an illegal memory access; in float32 it is right.
    """
    if (reason := refusal_gated_delta(device, dtype, key_dim, value_dim)) is not None:
        return reason
    if dtype != torch.float32 and _broken_on_hopper(device) is None:
        return "fla's chunk_comba is wrong in 16 bits, and right in float32"
    return None


def route_leaky_delta(device: torch.device) -> str:
    """The kernel `leaky_delta` calls here, and why where it is not the obvious one."""
    if (broken := _broken_on_hopper(device)) is not None:
        return f"chunk_kda with values times the gate, steps over it: {broken} gets the gradient of chunk_comba wrong"
    return "chunk_comba"


def leaky_delta(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor | None = None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """delta.py's map with the gradient before the decay. Arguments and results as recurrent_delta's.

    log_decay is per head. Where it is below LEAST_LOG_DECAY a document starts, and nothing is erased: b/a and a v,
    which turn one rule into the other, are b and v there.
    """
    if log_decay is None:
        return gated_delta(q, k, v, step_size, None, memory)
    forgets = log_decay < LEAST_LOG_DECAY
    if _broken_on_hopper(v.device) is not None:
        decay = log_decay.float().masked_fill(forgets, 0.0).exp()
        return gated_delta(q, k, v * decay.unsqueeze(-1).to(v.dtype), step_size / decay, log_decay, memory)
    return delta_with_write_key(q, k, v, step_size, log_decay, memory, k, gradient_before_decay=True)


def refusal_write_key(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why fla can't run the delta rule with a write key of its own here, or None if it can."""
    if (reason := refusal_leaky_delta(device, dtype, key_dim, value_dim)) is not None:
        return reason
    broken = _broken_on_hopper(device)
    return broken and f"{broken} gets the gradient of chunk_comba wrong"


def delta_with_write_key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_decay: Tensor | None,
    memory: Tensor | None,
    write_key: Tensor,
    gradient_before_decay: bool = False,
) -> tuple[Tensor, Tensor]:
    """delta.py's map with a write key of its own. Arguments and results as recurrent_delta's, log_decay per head."""
    if log_decay is None:
        return _comba(q, k, write_key, v, step_size, torch.zeros_like(step_size), memory)
    if gradient_before_decay:  # at the start of a document there is nothing to erase
        erase_key = k.masked_fill((log_decay < LEAST_LOG_DECAY).unsqueeze(-1), 0.0)
    else:
        erase_key = (k.float() * log_decay.float().exp().unsqueeze(-1)).to(v.dtype)
    return _comba(q, erase_key, write_key, v, step_size, log_decay, memory)


def _comba(
    q: Tensor, erase_key: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_decay: Tensor, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + b_t k_t^T (v_t - p_t S_{t-1}), p the erase key: fla's kernel reads before the decay. (Its
    naive_recurrent_comba reads after it, and is another function.)
    """
    from fla.ops.comba import chunk_comba

    q, p, k = (x.to(v.dtype) for x in (q, erase_key, k))
    log_decay, memory = log_decay.float().clamp(min=LEAST_LOG_DECAY), None if memory is None else memory.float()
    options = {"scale": 1.0, "initial_state": memory, "output_final_state": True}
    return chunk_comba(q, k, v, p, log_decay, step_size.float(), **options)


def _on_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9


def _broken_on_hopper(device: torch.device) -> str | None:
    if not _on_hopper(device):
        return None
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    return f"Triton {triton.__version__} on Hopper" if BROKEN_ON_HOPPER[0] <= version < BROKEN_ON_HOPPER[1] else None
