"""Local linear attention as a flash kernel: memory linear in T, forward and backward.

The problem and its solution are in models/regression/local/polynomial.py, here of order 1: with w_i = softmax_i(beta
q . k_i), m = sum_i w_i k_i, x_i = k_i - m, C = sum_i w_i x_i x_i^T and A = C + lambda I, every query has
                u = A^-1 (q - m) ,    o = sum_i w_i f_i v_i ,    f_i = 1 + x_i . u .
Forward.    Passes over the keys: one for log sums and m; one for each product with C that conjugate gradients want for
            a block of queries; one for o. Kept are m, u and the log sums.
Backward.   With a_i = do . v_i the gradient by u is du = sum_i w_i a_i x_i, and z = A^-1 du, once more by conjugate
            gradients, is all that the solution's gradient needs: du . d(A^-1 b) = z . (db - dA u). With h_i = x_i . z,
            what depends on w, m, k, q and lambda is then
                F = sum_i w_i f_i a_i + z . (q - m) - sum_i w_i h_i (x_i . u) - lambda z . u .
            As sum_i w_i x_i = 0, dF/dm = -(a u + z) with a = sum_i w_i a_i, and with e_i = a_i - a - h_i
                dv_i = sum_t w_i f_i do ,          dk_i = sum_t w_i (e_i u - f_i z) + ds_i beta q ,
                ds_i = w_i (e_i f_i - c) ,         dq = z + beta sum_i ds_i k_i ,
                d beta = q . sum_i ds_i k_i ,      d lambda = -z . u ,            c = sum_i w_i e_i f_i .
            Three kinds of passes over the keys (du, the products with C, dq) and one over the queries (dk, dv).
Cost.       A pass of products with C is four products of T x S x K, where softmax has two in all. How many there are
            depends on how many eigenvalues of C stand out from lambda: for random keys of length one with K = 64 and
            lambda = 0.1 six for the first tokens of a document and three after 4,000 (15 and 5 with 0.01). (A diagonal
            preconditioner would take another product; keys that positions have turned know no axes.)
Precision.  bfloat16 products, or TF32 for float32 and for float16, which TF32 holds; all sums and m are float32. What
            comes in as float32 is rounded to TF32 first, so that it is one system that is solved, of keys 5e-4 off. A
            rounded weight is another weight, eps off, and C another C, as much off relative to itself; so the solutions
            are, eps = 2e-3 or 5e-4, whatever lambda is, and they are solved to half of that. Outputs and gradients are
            a few eps off, relative to their length; d beta and d lambda, sums over all queries that may cancel, ten;
            and dk and d lambda more where lambda is small, as differences of terms as large as 1 / lambda: at 1e-3 up
            to 4e-2 and 1e-1 in bfloat16, a tenth of it in TF32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels import backend
from models.kernels.backend import interpreting

WIDEST = 128
SHARED = 166_912  # bytes of shared memory that keys or values wider than 64 want
ROOMY = 214_024  # bytes of it that faster launches want, which an H100 has and an A100 has not
LEAST_TRITON_ON_BLACKWELL = (3, 9)  # 3.7.1 fails to compile the kernels for compute capability 10

# BM queries, BN keys at a time, num_warps, num_stages; by the larger of K and V, up to 64 or to 128, and by the dtype;
# ROOMY is 128 where there is so much shared memory.
# Chosen so that two programs fit on a multiprocessor of an H100 and the loops over keys spill no registers; with more
# shared memory, the fastest of some on an H200 with documents of 500 tokens.
Launch = tuple[int, int, int, int]
Launches = dict[tuple[int, torch.dtype], Launch]
FORWARD: Launches = {
    (64, torch.bfloat16): (64, 64, 4, 3),
    (64, torch.float32): (64, 64, 4, 2),
    (128, torch.bfloat16): (64, 64, 4, 2),
    (128, torch.float32): (64, 32, 8, 2),
    (ROOMY, torch.bfloat16): (64, 32, 4, 3),
}
BACKWARD_QUERIES: Launches = {
    (64, torch.bfloat16): (64, 64, 4, 3),
    (64, torch.float32): (64, 32, 4, 2),
    (128, torch.bfloat16): (64, 32, 4, 2),
    (128, torch.float32): (32, 32, 4, 2),
    (ROOMY, torch.bfloat16): (128, 32, 8, 3),
}
BACKWARD_KEYS: Launches = {
    (64, torch.bfloat16): (32, 64, 4, 3),
    (64, torch.float32): (32, 128, 8, 2),
    (128, torch.bfloat16): (32, 128, 8, 2),
    (128, torch.float32): (16, 64, 4, 2),
    (ROOMY, torch.bfloat16): (32, 128, 8, 3),
}
INTERPRETED: Launch = (64, 64, 4, 1)


def refusal(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why the kernels can't run here, or None if they can. dtype is that of q, k and v."""
    if (reason := backend.refusal(device, dtype)) is not None:
        return reason
    if max(key_dim, value_dim) > WIDEST:
        return f"the kernels hold whole keys and values, up to {WIDEST} wide, not {key_dim} and {value_dim}"
    return _refusal_of_gpu(device, max(key_dim, value_dim)) if device.type == "cuda" else None


def _refusal_of_gpu(device: torch.device, width: int) -> str | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return f"TF32 and bfloat16 products want compute capability 8, this GPU has {properties.major}"
    if properties.major == 10:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON_ON_BLACKWELL:
            return f"Triton {triton.__version__} can't compile the kernels for this GPU, 3.9 can"
    if width > 64 and properties.shared_memory_per_block_optin < SHARED:
        has, wants = properties.shared_memory_per_block_optin >> 10, SHARED >> 10
        return f"keys or values {width} wide want {wants} KB of shared memory, this GPU has {has}"
    return None


def local_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    ridge: Tensor,
    start: Tensor | None = None,
    past: int = 0,
    window: int | None = None,
) -> Tensor:
    """q [B, T, H, K]; k [B, S, G, K], v [B, S, G, V] with S = past + T; beta, ridge [H]; start [B or 1, T], past and
    window: pairs.View, start never falling along a row. Returns o [B, T, H, V] in the dtype of v, to which q and k are
    cast; gradients of q, k, v, beta and ridge, once.
    """
    if start is not None:
        start = start.to(torch.int32).expand(q.shape[0], -1).contiguous()
    dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
    q, k, v_ = (x.to(dtype).contiguous() for x in (q, k, v))
    return backend.call(forward, q, k, v_, beta.float(), ridge.float(), start, past, window)[0].to(v.dtype)


@torch.library.custom_op("test_time_regression::local_linear", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor, start: Tensor | None, past: int, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o and, for the backward, m [B, T, H, K], u in two parts [2, B, T, H, K] and the log sums [B, H, T]. All tensors
    contiguous."""
    from models.kernels.local_linear.kernels import forward_kernel

    results = _results(q, k, v, beta, ridge, start, past, window)
    numbers, settings, (BM, _) = _launch(FORWARD, q, v, start, past, window)
    grid = (q.shape[0] * q.shape[2], -(-q.shape[1] // BM))
    q, k, v, tolerance = _operand(q), _operand(k), _operand(v), _rounding(k.dtype)[1]
    with torch.cuda.device_of(q):
        forward_kernel[grid](q, k, v, beta, ridge, start, *results, *numbers, tolerance, **settings)
    return results


@forward.register_fake
def _results(q, k, v, beta, ridge, start, past, window):
    (B, T, H, K), V = q.shape, v.shape[-1]
    mean, level = (q.new_empty(size, dtype=torch.float32) for size in ((B, T, H, K), (B, H, T)))
    return q.new_empty(B, T, H, V), mean, q.new_empty(2, B, T, H, K), level


@torch.library.custom_op("test_time_regression::local_linear_backward", mutates_args=())
def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    ridge: Tensor,
    start: Tensor | None,
    mean: Tensor,
    u: Tensor,
    level: Tensor,
    past: int,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients by q, k, v, beta and ridge."""
    from models.kernels.local_linear.kernels import backward_keys_kernel, backward_queries_kernel

    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    z, each = torch.empty_like(u), level.new_empty(5, B, H, T)
    do, q, k, v, tolerance = _operand(do), _operand(q), _operand(k), _operand(v), _rounding(k.dtype)[1]
    stop = None
    if start is not None:
        index = torch.arange(S, dtype=start.dtype, device=start.device).expand(B, -1)
        stop = torch.searchsorted(start, index.contiguous(), right=True, out_int32=True)
    with torch.cuda.device_of(q):
        numbers, settings, (BM, _) = _launch(BACKWARD_QUERIES, q, v, start, past, window)
        backward_queries_kernel[B * H, -(-T // BM)](
            q, k, v, beta, ridge, start, mean, u, level, do, dq, z, each, *numbers, tolerance, **settings
        )
        numbers, settings, (_, BN) = _launch(BACKWARD_KEYS, q, v, start, past, window)
        backward_keys_kernel[B * G, -(-S // BN)](
            q, k, v, beta, start, stop, u, z, level, do, each, dk, dv, *numbers, **settings
        )
    return dq, dk, dv, each[3].sum((0, 2)), each[4].sum((0, 2))


@backward.register_fake
def _(do, q, k, v, beta, ridge, *rest):
    return tuple(torch.empty_like(x) for x in (q, k, v, beta, ridge))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.past, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, do: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *backward(do.contiguous(), *ctx.saved_tensors, ctx.past, ctx.window), None, None, None


forward.register_autograd(_gradients, setup_context=_keep)


def _launch(
    launches: Launches, q: Tensor, v: Tensor, start: Tensor | None, past: int, window: int | None
) -> tuple[tuple[int, ...], dict[str, object], tuple[int, int]]:
    """What the kernels are told of the sizes: numbers, and what they are compiled for."""
    (T, H, K), (S, G, V) = q.shape[1:], v.shape[1:]
    widest = 64 if max(K, V) <= 64 else WIDEST
    if (ROOMY, v.dtype) in launches and widest == WIDEST and _shared_memory(v.device) >= ROOMY:
        widest = ROOMY
    BM, BN, num_warps, num_stages = INTERPRETED if interpreting() else launches[widest, v.dtype]
    padded = (max(16, 1 << (width - 1).bit_length()) for width in (K, V))
    settings: dict[str, object] = {"DOCUMENTS": start is not None, "PRECISION": _rounding(v.dtype)[0]}
    settings |= zip(("H", "G", "K", "V", "BK", "BV", "BM", "BN"), (H, G, K, V, *padded, BM, BN), strict=True)
    settings |= {"num_warps": num_warps, "num_stages": num_stages}
    return (T, S, past, past + T if window is None else window), settings, (BM, BN)


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program can have."""
    return 0 if device.type != "cuda" else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _operand(x: Tensor) -> Tensor:
    """x as every product reads it."""
    if x.dtype != torch.float32 or _rounding(x.dtype)[0] == "ieee":
        return x
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _rounding(dtype: torch.dtype) -> tuple[str, float]:
    """The precision of products of this dtype, and the tolerance of a solve: half of how far their operands are off."""
    if interpreting():
        return "ieee", 1e-6
    return "tf32", 2.0**-10 if dtype == torch.bfloat16 else 2.0**-12
