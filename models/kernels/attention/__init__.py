"""Softmax over intervals of pairs: documents, windows and fading weights, without a mask of T x S.

Query t uses the pairs from its first, l_t, to itself, of which l never falls along a row:
                w_ti = exp(q_t . k_i + age_i - age_t) ,    o_t = sum_{l_t <= i <= t} w_ti v_i / e^L_t ,
                L_t = log sum_{l_t <= i <= t} w_ti .
Forward.    One pass over the pairs of a block of queries, with the largest logit so far taken off (Milakov and
            Gimelshein 2018; FlashAttention, Dao et al. 2022). Kept are o and L.
Backward.   With p_ti = w_ti e^-L_t, a_ti = do_t . v_i and delta_t = do_t . o_t - dL_t
                dv_i = sum_t p_ti do_t ,    ds_ti = p_ti (a_ti - delta_t) ,
                dq_t = sum_i ds_ti k_i ,    dk_i = sum_t ds_ti q_t ,    d age_i = sum_t ds_ti .
            The last as a key; as a query -dL_t, since sum_i ds_ti = dL_t. Two kernels compute the weights anew, one
            for blocks of queries and one for blocks of keys: seven products where atomic sums would need five, and the
            same bits in every run.
Documents.  A block of queries ends where its last does and begins at the first pair of its first; a block of keys meets
            the queries up to the last whose document began before it. What lies outside costs nothing, and nothing is
            counted on the host: shapes don't depend on the documents.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.backend import interpreting

WIDEST = {2: 256, 4: 128}  # by the bytes of a number
SHARED = 166_912  # bytes of shared memory that a program may want, as an A100 has


class Launch(NamedTuple):
    """Queries and keys at a time; warps and stages as Triton's."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# By the larger of K and V, up to 64, 128 or 256, and by the bytes of a number.
FORWARD = {
    (64, 2): Launch(128, 128, 4, 3),
    (128, 2): Launch(64, 64, 4, 3),
    (256, 2): Launch(64, 32, 4, 3),
    (64, 4): Launch(64, 32, 4, 2),
    (128, 4): Launch(64, 32, 4, 2),
}
BACKWARD_QUERIES = {
    (64, 2): Launch(128, 64, 4, 3),
    (128, 2): Launch(128, 64, 8, 3),
    (256, 2): Launch(64, 32, 4, 2),
    (64, 4): Launch(64, 32, 4, 2),
    (128, 4): Launch(32, 32, 4, 2),
}
BACKWARD_KEYS = {
    (64, 2): Launch(64, 128, 8, 3),
    (128, 2): Launch(64, 64, 4, 2),
    (256, 2): Launch(32, 64, 8, 2),
    (64, 4): Launch(32, 64, 8, 2),
    (128, 4): Launch(32, 32, 4, 2),
}
INTERPRETED = Launch(64, 64, 4, 1)


def refusal(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why the kernels can't run here, or None if they can. dtype is that of q, k and v."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if max(key_dim, value_dim) > (widest := WIDEST[dtype.itemsize]):
        return f"the kernels hold whole keys and values, up to {widest} wide in {dtype}, not {key_dim} and {value_dim}"
    if device.type == "cuda" and torch.cuda.is_available():
        return backend.refusal_of_gpu(device, SHARED)
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None = None,
    past: int = 0,
    window: int | None = None,
    age: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and L [B, T, H].

    q [B, T, H, K]; k [B, S, G, K], v [B, S, G, V], all of one dtype. Query t is pair past + t and uses the pairs from
    start [B, T] (None for 0), which never falls along a row, of those the last `window`, and itself. Where there are
    fewer pairs than that, it uses the last. age [B, S, H] or None: what is added to logits, and what a query has of it
    taken off. o in the dtype of v, L in float32; gradients of q, k, v and age, once.
    """
    if start is not None:
        start = start.to(torch.int32).contiguous()
    if age is not None:
        age = age.float().transpose(1, 2).contiguous()
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    o, level = backend.call(forward, q, k, v, age, start, past, window)
    return o, level.transpose(1, 2) * math.log(2)


@torch.library.custom_op("test_time_regression::attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, age: Tensor | None, start: Tensor | None, past: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """o, and log2 of the sums of weights [B, H, T]. age [B, H, S]; start [B, T] in int32, both contiguous."""
    from models.kernels.attention.kernels import forward_kernel

    q, k, v = map(_by_rows, (q, k, v))
    o, level = _results(q, k, v, age, start, past, window)
    launch, numbers, settings = _launch(FORWARD, q, k, v, age, start, past, window)
    with torch.cuda.device_of(q):
        forward_kernel[_grid(q, launch.BM)](q, k, v, age, start, o, level, *numbers, **settings)
    return o, level


@forward.register_fake
def _results(q, k, v, age, start, past, window):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("test_time_regression::attention_backward", mutates_args=())
def backward(
    do: Tensor,
    d_level: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    age: Tensor | None,
    start: Tensor | None,
    o: Tensor,
    level: Tensor,
    past: int,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by q, k, v and age, the last empty where there is none. d_level [B, H, T]: of natural logarithms,
    float32; it and do contiguous."""
    from models.kernels.attention.kernels import backward_keys_kernel, backward_queries_kernel

    B, S = k.shape[:2]
    q, k, v = map(_by_rows, (q, k, v))
    dq, dk, dv, d_age = _gradients_of(do, d_level, q, k, v, age, start, o, level, past, window)
    delta, stop = torch.empty_like(level), None
    if start is not None:
        index = torch.arange(S, dtype=start.dtype, device=start.device).expand(B, -1)
        stop = torch.searchsorted(start, index.contiguous(), right=True, out_int32=True)
    with torch.cuda.device_of(q):
        launch, numbers, settings = _launch(BACKWARD_QUERIES, q, k, v, age, start, past, window)
        backward_queries_kernel[_grid(q, launch.BM)](
            q, k, v, age, start, o, level, do, d_level, dq, delta, *numbers, **settings
        )
        launch, numbers, settings = _launch(BACKWARD_KEYS, q, k, v, age, start, past, window)
        backward_keys_kernel[_grid(k, launch.BN)](
            q, k, v, age, start, stop, level, delta, do, dk, dv, d_age, *numbers, **settings
        )
    return dq, dk, dv, d_age


@backward.register_fake
def _gradients_of(do, d_level, q, k, v, age, *rest):
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0) if age is None else torch.empty_like(age)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.past, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, do: Tensor | None, d_level: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors: tuple[Any, ...] = ctx.saved_tensors
    (age, _, o, level) = tensors[3:]
    do = torch.zeros_like(o) if do is None else do.contiguous()
    d_level = torch.zeros_like(level) if d_level is None else (d_level / math.log(2)).contiguous()
    dq, dk, dv, d_age = backward(do, d_level, *tensors, ctx.past, ctx.window)
    if age is None:
        return dq, dk, dv, None, None, None, None
    d_age[..., ctx.past : ctx.past + d_level.shape[-1]] -= d_level
    return dq, dk, dv, d_age, None, None, None


forward.register_autograd(_gradients, setup_context=_keep)


def _by_rows(x: Tensor) -> Tensor:
    """x [B, T, H, K] as the kernels address it: as it is where a token's heads are side by side and all tokens equally
    far apart, by what vectors of 16 bytes can be read from; or else a contiguous copy."""
    b, t, h, one = x.stride()
    aligned = t * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if (b, h, one) == (x.shape[1] * t, x.shape[3], 1) and aligned else x.contiguous()


def _grid(x: Tensor, block: int) -> tuple[int]:
    B, T, H, _ = x.shape
    return (B * H * -(-T // block),)


def _launch(
    launches: dict[tuple[int, int], Launch],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    age: Tensor | None,
    start: Tensor | None,
    past: int,
    window: int | None,
) -> tuple[Launch, tuple[int, ...], dict[str, object]]:
    """The configuration, and what the kernels are told of the sizes: numbers, and what they are compiled for."""
    (T, H, K), (S, G, V) = q.shape[1:], v.shape[1:]
    BK, BV = (max(16, 1 << (width - 1).bit_length()) for width in (K, V))
    launch = INTERPRETED if interpreting() else launches[max(64, BK, BV), v.element_size()]
    precision = "ieee" if interpreting() else "tf32x3" if v.dtype == torch.float32 else "tf32"
    settings: dict[str, object] = {"DOCUMENTS": start is not None, "FADES": age is not None, "PRECISION": precision}
    settings |= zip(("H", "G", "K", "V", "BK", "BV"), (H, G, K, V, BK, BV), strict=True)
    numbers = (T, S, past, past + T if window is None else window, q.stride(1), k.stride(1), v.stride(1))
    return launch, numbers, settings | launch._asdict()
