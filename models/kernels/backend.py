"""Where Triton can run: what every kernel asks before its own limits."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = (Tensor, nn.Parameter)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # looked up once: Dynamo warns of caches


def compiles(device: torch.device) -> bool:
    """Whether torch.compile can: on a GPU, with Triton."""
    return device.type == "cuda" and TRITON_INSTALLED


def unlike(recipe: dict[str, Any], takes: dict[str, tuple[Any, ...]]) -> str | None:
    """The first setting of a recipe that kernels which take these values do not compute, in words, or None."""
    for name, allowed in takes.items():
        if recipe[name] not in allowed:
            said = " or ".join(str(value).lower() for value in allowed)
            return f"the kernels take regressor.{name}={said}, not {str(recipe[name]).lower()}"
    return None


def packed(call: NamedTuple) -> tuple[list[Tensor], str]:
    """The tensors of a call as an operator of torch takes them: those that are there, and their names. In a list with
    None in it torch (2.13) would not see the tensors that want gradients."""
    given = {name: x for name, x in call._asdict().items() if x is not None}
    return list(given.values()), " ".join(given)


Call = TypeVar("Call", bound=NamedTuple)


def unpacked(kind: type[Call], given: list[Tensor], names: str) -> Call:
    found: dict[str, Any] = dict(zip(names.split(), given, strict=True))
    return kind._make(found.get(name) for name in kind._fields)


def call(operator: Any, *given: Any) -> Any:
    """operator(*given), one of torch.library.custom_op's. Where nothing looks at it, its function alone: on the way
    through the dispatcher the host spends more time than on a launch, and a prompt's layers wait for the host.
    """
    # the compiler knows the operator; it is asked for first, since it does not follow the rest
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or watched(given):
        return operator(*given)
    return operator._init_fn(*given)


def watched(given: tuple[Any, ...]) -> bool:
    """Whether tracers, transforms, profilers or tensors of another kind see operators, and would not see a function."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
        or not all(map(_plain, given))
    )


def _plain(x: Any) -> bool:
    """Whether a kernel may read it as it lies in memory: the dispatcher would resolve a negated tensor first."""
    if isinstance(x, Tensor):
        odd = x.is_neg() or x.is_conj() or x.is_meta or torch._is_functional_tensor(x)
        return type(x) in PLAIN and not odd
    return all(map(_plain, x)) if isinstance(x, list) else True


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). Triton's own belongs to the language of kernels, and takes a launch several microseconds a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on a CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run here, or None if one can. dtype is that of q, k and v."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not interpreting():
        return f"Triton needs a GPU, this is {device.type}"
    if interpreting() and dtype == torch.bfloat16:
        return "Triton's interpreter keeps bfloat16 as integers and returns garbage"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels compute in 16 or 32 bits, not {dtype}"
    return None


def refusal_of_gpu(device: torch.device, shared: int) -> str | None:
    """Why this GPU can't run kernels that want bfloat16 or TF32 products and so many bytes of shared memory."""
    properties: Any = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return f"TF32 and bfloat16 products want compute capability 8, this GPU has {properties.major}"
    if (has := properties.shared_memory_per_block_optin) < shared:
        return f"the kernels want {shared >> 10} KB of shared memory, this GPU has {has >> 10}"
    return None
