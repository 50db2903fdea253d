"""Products as tensor cores make them in TF32, on a CPU: of float32 they see 11 bits, of which one is not stored.

The interpreter multiplies float32 whatever a kernel asks for, and so does PyTorch on a CPU. What goes wrong by rounding
alone would be seen on a GPU first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DROPPED = np.uint32(0x1FFF)  # the last 13 of the 23 bits that are stored
HALF = np.uint32(0x1000)


def cut(x: Any, nearest: bool = False) -> Any:
    """An array of which only the first bits are left, as the hardware takes it; or the nearest such, as Triton makes
    the parts of three products."""
    if x.dtype != np.float32:
        return x
    return ((x.view(np.uint32) + nearest * HALF) & ~DROPPED).view(np.float32)


def products(a: Any, b: Any, asked: str) -> Any:
    """a @ b as asked for: tf32x3 is three products, of which each has one part of an operand. Sums are in float32."""
    if a.dtype == np.float16:
        return np.matmul(a, b, dtype=np.float32)
    if "TF32x3" in asked:
        high, other = cut(a, nearest=True), cut(b, nearest=True)
        low, rest = cut(a - high, nearest=True), cut(b - other, nearest=True)
        return np.matmul(low, other) + np.matmul(high, rest) + np.matmul(high, other)
    return np.matmul(cut(a), cut(b)) if asked.endswith("TF32") else np.matmul(a, b)


class Cut(TorchDispatchMode):
    """PyTorch's products of float32 where "high" is allowed."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("bmm", "mm", "baddbmm", "addmm") and torch.get_float32_matmul_precision() == "high":
            kept, operands = args[:-2], args[-2:]
            args = (*kept, *(torch.from_numpy(cut(x.contiguous().numpy())) for x in operands))
        return function(*args, **(kwargs or {}))


@contextmanager
def rounded() -> Iterator[None]:
    """Triton's products in the interpreter, and PyTorch's."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = products(a.data, b.data, str(input_precision)).astype(d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    before = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = create_dot
    try:
        with Cut():
            yield
    finally:
        InterpreterBuilder.create_dot = before
