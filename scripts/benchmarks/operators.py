"""What is timed, and what it is timed against: a case for every size."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import Tensor, nn

from models.kernels import fla
from models.kernels import local_linear as kernels
from models.mixers.mixer import Mixer
from models.parts.decay import NoDecay
from models.parts.features import Identity
from models.parts.sizes import Sizes
from models.regression.deep.ttt import TTT
from models.regression.linear.delta import chunked_delta, kernel_delta
from models.regression.linear.momentum import chunked_momentum, kernel_momentum
from models.regression.local.constant import Softmax, of_heads
from models.regression.local.kernel import Factor, gaussian, parallel_intention
from models.regression.local.pairs import Pairs, View
from models.regression.local.polynomial import blocked_local_polynomial
from models.regression.memory import Memory
from models.regression.regressor import FORGET, Tokens
from scripts.benchmarks import parts, peers
from scripts.benchmarks.intervals import softmax_over_intervals
from scripts.benchmarks.pairs import pairs
from scripts.benchmarks.parts import half
from scripts.benchmarks.timing import Case, Operator, graphed, same
from scripts.recipes import composed, mixer_of
from scripts.reports.presets import all_classes

if TYPE_CHECKING:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention


def cases(device: str) -> dict[str, Callable[[], Case]]:
    """size -> what makes its inputs and operators."""
    if device == "cpu":
        return {
            "delta B4 T1024 H4 K64": lambda: delta_on_a_cpu(4, 1024, 4, 64),
            "delta B16 T256 H4 K32": lambda: delta_on_a_cpu(16, 256, 4, 32),
            "softmax B4 T1024 H4 K64": lambda: softmax_layer(4, 1024, 4, 64, device, torch.float32),
            "local linear B1 T512 H2 K32": lambda: local_linear(1, 512, 2, 32, device),
            "intention B1 T128 H2 K32": lambda: intention(1, 128, 2, 32, device, solved_apart=True),
        } | (parts.cases(device) | memories(2, 256, 4, 32, device))
    return {
        "delta B8 T4096 H8 K128": lambda: delta_on_a_gpu((8, 4096, 8, 128)),
        "delta, documents of 500 B16 T2048 H8 K128": lambda: delta_on_a_gpu((16, 2048, 8, 128), 500),
        "momentum B8 T4096 H8 K128": lambda: momentum(8, 4096, 8, 128),
        "pairs of gated_delta B16 T2048 H8 K128": lambda: pairs("gated_delta", 16, 2048, 8, 128),
        "pairs of softmax B16 T2048 H8 K128": lambda: pairs("softmax", 16, 2048, 8, 128),
        "softmax B8 T4096 H8 K128": lambda: softmax_layer(8, 4096, 8, 128, device, torch.bfloat16),
        "documents of 500 B16 T2048 H8 K128": lambda: softmax_over_intervals((16, 2048, 8, 128), 500),
        "documents of 2000 B16 T2048 H8 K128": lambda: softmax_over_intervals((16, 2048, 8, 128), 2000),
        "window of 256 B16 T2048 H8 K128": lambda: softmax_over_intervals((16, 2048, 8, 128), None, 256),
        "local linear B1 T8192 H8 K64": lambda: local_linear(1, 8192, 8, 64, device),
        "intention B4 T1024 H8 K64": lambda: intention(4, 1024, 8, 64, device),
        "intention B1 T256 H2 K64": lambda: intention(1, 256, 2, 64, device, solved_apart=True),
        "ttt_linear B8 T4096 H8 K64": lambda: ttt(8, 4096, 8, 64, "linear"),
        "ttt_mlp B8 T4096 H8 K64": lambda: ttt(8, 4096, 8, 64, "mlp"),
        "deep memory B8 T4096 H8 K64": lambda: deep_memory(8, 4096, 8, 64, device),
    } | (parts.cases(device) | memories(8, 4096, 8, 128, device))


def delta_on_a_cpu(*shape: int) -> Case:
    named = {"transformers, chunked": peers.transformers_delta, "ours, chunked": ours_delta}
    return same(draw(shape, torch.float32, "cpu"), named)


def delta_on_a_gpu(shape: tuple[int, int, int, int], length: int | None = None) -> Case:
    """All compute o = q S with the peers' scale, 1/sqrt(K). length: of packed documents, on average; None for none."""
    inputs = draw(shape, torch.bfloat16, "cuda")
    if length is not None:
        starts = torch.rand(*shape[:2], 1, device="cuda") < 1 / length
        inputs[3] = inputs[3].detach().masked_fill(starts, FORGET).requires_grad_()
    named = {
        "ours, by fla": lambda q, k, v, g, b: fla.gated_delta(q * q.shape[-1] ** -0.5, k, v, b, g)[0],
        "ours, Triton": lambda q, k, v, g, b: kernel_delta(q * q.shape[-1] ** -0.5, k, v, b, g)[0],
        "ours, chunked": ours_delta,
        "fla chunk_kda": peers.kda,
        "SDPA (another model)": sdpa,
    }
    if fla.route_gated_delta(torch.device("cuda")).startswith("chunk_gated_delta_rule"):
        named = {"fla chunk_gated_delta_rule": peers.gated_delta_rule, **named}
    if importlib.util.find_spec("flash_qla") is not None:
        named["FlashQLA"] = peers.flash_qla
    return same(inputs, named)


def momentum(*shape: int) -> Case:
    """Titans' linear memory: the exact rule, with gradients at the start of a chunk, and without momentum; peers."""
    q, k, v, log_decay, step_size = draw(shape, torch.bfloat16, "cuda")
    log_momentum = F.logsigmoid(torch.randn(shape[:3], device="cuda")).requires_grad_()
    step_size = step_size * (1 - log_momentum.exp())
    given = [q, k, v, step_size.detach().requires_grad_(), log_momentum, log_decay]

    def leaky(q: Tensor, k: Tensor, v: Tensor, b: Tensor, eta: Tensor, a: Tensor) -> Tensor:
        return kernel_delta(q, k, v, b, a, gradient_before_decay=True)[0]

    named = {
        "ours, Triton": output_of(kernel_momentum),
        "ours, chunked": output_of(partial(chunked_momentum, chunk=64)),
        "ours, gradients per 64": output_of(partial(kernel_momentum, grad_batch=64)),
        "ours, momentum 0": leaky,
        "fla momentum_delta_rule": lambda q, k, v, b, eta, a: peers.momentum_delta_rule(q, k, v, a, b),
        "fla gated_delta_rule": lambda q, k, v, b, eta, a: peers.gated_delta_rule(q, k, v, a, b),
        "SDPA": sdpa,
    }
    if importlib.util.find_spec("flash_qla") is not None:
        named["FlashQLA"] = lambda q, k, v, b, eta, a: peers.flash_qla(q, k, v, a, b)
    return Case({name: Operator(function, given) for name, function in named.items()}, alike=False)


def softmax_layer(B: int, T: int, H: int, K: int, device: str, dtype: torch.dtype) -> Case:
    """The whole layer, projections and positions included, with the same weights in both."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config, Qwen3RotaryEmbedding

    torch.manual_seed(0)
    sizes = {"hidden_size": H * K, "num_attention_heads": H, "num_key_value_heads": H, "head_dim": K}
    settings: dict[str, Any] = {**sizes, "attn_implementation": "sdpa"}
    config = Qwen3Config(**settings)
    theirs, rotary = Qwen3Attention(config, layer_idx=0).to(device), Qwen3RotaryEmbedding(config).to(device)
    ours = mixer_of_qwen3(theirs)
    positions = torch.arange(T, device=device).unsqueeze(0)

    def at(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def operator(x: Tensor) -> Tensor:
            with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
                return layer(x)

        return operator

    named = {
        "transformers, Qwen3Attention": at(lambda x: theirs(x, rotary(x, positions), attention_mask=None)[0]),
        "ours, Mixer": at(lambda x: ours(x)[0]),
    }
    return same([torch.randn(B, T, H * K, device=device).requires_grad_()], named)


def local_linear(B: int, T: int, H: int, K: int, device: str) -> Case:
    """Both solvers, float32; on a GPU our kernels too, and softmax in bf16: another model, a yardstick."""
    q, k, v = draw((B, T, H, K), torch.float32, device)[:3]
    beta, ridge = torch.full((H,), K**0.5, device=device), torch.full((H,), 0.1, device=device)

    def ours(widest_cholesky: int) -> Callable[..., Tensor]:
        def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, block = F.normalize(q, dim=-1), 256 if device == "cuda" else 64
            return blocked_local_polynomial(q, Pairs(k, v), beta, ridge, View(), 1, True, block, widest_cholesky)

        return operator

    def triton(dtype: torch.dtype) -> Callable[..., Tensor]:
        def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.to(dtype) for x in (F.normalize(q, dim=-1), k, v))
            return kernels.local_linear(q, k, v, beta, ridge).float()

        return operator

    named = {"ours, Cholesky": ours(K), "ours, conjugate gradients": ours(0)}
    if device == "cuda":
        named |= {"ours, Triton TF32": triton(torch.float32), "ours, Triton bf16": triton(torch.bfloat16)}
        named["SDPA bf16 (another model)"] = half_softmax
    return same([q, k, v], named)


def intention(B: int, T: int, H: int, K: int, device: str, solved_apart: bool = False) -> Case:
    """solved_apart: beside the systems of all T queries, solved one by one in a batch, which takes T^3 numbers."""
    q, k, v = draw((B, T, H, K), torch.float32, device)[:3]
    beta, ridge = torch.full((H,), K**0.5, device=device), torch.full((B, T, H), 0.1, device=device)
    empty = (k.new_empty(B, 0, H, K), k.new_empty(B, H, 0, 0), k.new_empty(B, H, 0, K), k.new_zeros(B, H))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel_intention(F.normalize(q, dim=-1), k, v, beta, ridge, View(), Factor(*empty))[0]

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (F.normalize(q, dim=-1), k, v))
        seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        kernel = gaussian(k, k, of_heads(beta)).unsqueeze(2) * (
            seen.unsqueeze(1) & seen.unsqueeze(2)
        )  # [B, H, T, T, T]
        L = torch.linalg.cholesky(kernel + 0.1 * torch.eye(T, device=device))
        kappa = gaussian(q, k, of_heads(beta)) * seen
        return (torch.cholesky_solve(kappa.unsqueeze(-1), L).mT @ v.unsqueeze(2)).squeeze(-2).transpose(1, 2)

    named = {"ours, one Cholesky": ours, "SDPA bf16 (another model)": half_softmax}
    return same([q, k, v], {"ours, one Cholesky": ours, "T separate solves": apart} if solved_apart else named)


def half_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (F.normalize(q, dim=-1), k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=q.shape[-1] ** 0.5).transpose(1, 2).float()


def ttt(B: int, T: int, H: int, K: int, inner_model: str) -> Case:
    """Our kernels, compiled around as train.py does, and the PyTorch form; for the linear one also fla's, of another
    function with as many products."""
    inputs, x = draw((B, T, H, K), torch.bfloat16, "cuda")[:3], torch.randn(B, T, H * K, device="cuda")

    def by(backend: str) -> Operator:
        torch.manual_seed(0)
        module = TTT(Sizes(H * K, H, H, K, K), backend, inner_model).to("cuda")
        module.compile(dynamic=False)
        return Operator(lambda q, k, v: module(Tokens(x, q, k, v))[0], inputs, tuple(module.parameters()))

    operators = {"ours, Triton": by("triton"), "ours, mini-batches": by("torch")}
    if inner_model == "linear":
        operators["fla, ttt_linear"] = Operator(peers.ttt_linear, inputs)
    return Case(operators, alike=False)


def deep_memory(B: int, T: int, H: int, K: int, device: str) -> Case:
    """The whole layer, projections included, with the gradients of all parameters; ours compiled around the memory."""
    x = torch.randn(B, T, H * K, device=device).requires_grad_()
    sizes = f"model.num_heads={H}", f"model.hidden_size={H * K}"

    def layer(preset: str, *settings: str) -> Layer:
        torch.manual_seed(0)
        chosen = [f"model.mixers.main.regressor.{setting}" for setting in settings]
        mixer = mixer_of(composed(preset, *sizes, *chosen))
        if device == "cuda":  # as train.py does
            mixer.compile(dynamic=False)
        return Layer(mixer, device)

    def peer(grad_batch: int | None) -> Layer:
        torch.manual_seed(0)
        return Layer(peers.titans_memory(H * K, H, grad_batch), device)

    def timed(module: Layer) -> Operator:
        return Operator(module, [x], tuple(module.parameters()))

    operators = {}
    if device == "cuda":
        operators["ours, Triton"] = timed(layer("titans_mlp", "backend=triton"))
        operators[f"ours, Triton, hidden {2 * K}"] = timed(layer("titans_mlp", "backend=triton", "expansion=2"))
    operators["ours, PyTorch"] = timed(layer("titans_mlp", "backend=torch", "remat=0"))
    operators["ours, PyTorch, remat 8"] = timed(layer("titans_mlp", "backend=torch"))
    if device == "cuda":
        operators["ours, PyTorch, CUDA graphs"] = graphed(layer("titans_mlp", "backend=torch", "remat=0"), x)
    operators["lact, chunks of 1024"] = timed(layer("lact", "grad_batch=1024", "window=1024"))
    if importlib.util.find_spec("titans_pytorch") is not None:
        operators["titans-pytorch, R per 64"] = timed(peer(64))
        operators["titans-pytorch, R per 512"] = timed(peer(512))
        operators["titans-pytorch, R = M_0"] = timed(peer(None))
    return Case(operators, alike=False)


class Layer(nn.Module):
    """The output [B, T, D] of a layer that returns a state with it, by bf16 products on a GPU."""

    def __init__(self, layer: nn.Module, device: str) -> None:
        super().__init__()
        self.layer, self.device = layer.to(device), device

    def forward(self, x: Tensor) -> Tensor:
        with half(self.device):
            return self.layer(x)[0]


def memories(B: int, T: int, H: int, K: int, device: str) -> dict[str, Callable[[], Case]]:
    """Every preset with a memory of fixed size, beside the gated delta rule; on a GPU also fla's own operator."""
    own = {name: classes.get("regressor._target_") for name, classes in all_classes().items()}  # not one that is inside
    found = [name for name, target in own.items() if target and issubclass(get_class(target), Memory)]
    return {f"memory {name} B{B} T{T} H{H} K{K}": partial(memory, name, (B, T, H, K), device) for name in found}


def memory(preset: str, shape: tuple[int, int, int, int], device: str) -> Case:
    operators = {name: regressor_of(name, shape, device) for name in ("gated_delta", preset)}
    if device == "cuda" and preset in peers.OF_PRESETS:
        peer = peers.OF_PRESETS[preset]
        operators[f"fla, {peer.__name__}"] = Operator(peer, draw(shape, torch.bfloat16, device))
    return Case(operators, alike=False)


def regressor_of(preset: str, shape: tuple[int, int, int, int], device: str) -> Operator:
    """A preset's regressor with what its mixer gives it: projections, convolution and features come before."""
    B, T, H, K = shape
    torch.manual_seed(0)
    mixer, given = mixer_of(sized(preset, H, K)).to(device), list[Tensor | None]()
    x = torch.randn(B, T, H * K, device=device)  # itself, where the mixer gives the regressor its products alone
    mixer.regressor.register_forward_pre_hook(lambda module, inputs: given.extend((x, *inputs[0][1:5])))
    with torch.no_grad(), half(device):
        mixer(x)
    inputs = [x if x is None else x.detach().clone().requires_grad_() for x in given]

    def function(*inputs: Tensor) -> Tensor:
        with half(device):
            return mixer.regressor.forward(Tokens(*inputs))[0]

    return Operator(function, inputs, tuple(mixer.regressor.parameters()))


@cache  # Hydra takes longer than the operator of a memory, and one stands beside each
def sized(preset: str, H: int, K: int) -> DictConfig:
    return composed(preset, f"model.num_heads={H}", f"model.hidden_size={H * K}")


def mixer_of_qwen3(attention: Qwen3Attention) -> Mixer:
    """Our softmax mixer with the weights of transformers' Qwen3 attention: the same function."""
    config: Any = attention.config
    K = attention.head_dim
    mixer = Mixer(
        config.hidden_size,
        layer_index=0,
        regressor=partial(Softmax, inverse_temperature=K**-0.5),
        decay=NoDecay,
        features=Identity,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        key_dim=K,
        value_dim=K,
        qk_norm="rms",
        rotary=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
    ).to(attention.q_proj.weight)
    with torch.no_grad():
        theirs = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        mixer.projection.weight.copy_(torch.cat(theirs))
        mixer.get_parameter("output.weight").copy_(attention.o_proj.weight)
        mixer.get_parameter("q_norm.weight").copy_(attention.q_norm.weight)
        mixer.get_parameter("k_norm.weight").copy_(attention.k_norm.weight)
    return mixer


def sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def output_of(form: Callable[..., tuple[Tensor, object]]) -> Callable[..., Tensor]:
    """The form without the state that it returns."""
    return lambda *x: form(*x)[0]


def ours_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step_size: Tensor) -> Tensor:
    return chunked_delta(q * q.shape[-1] ** -0.5, k, v, step_size, log_decay, chunk=64 if q.is_cuda else 32)[0]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device=device) for _ in range(3))
    gates = [F.logsigmoid(torch.randn(shape[:3], device=device) + 3), torch.rand(shape[:3], device=device)]
    return [x.requires_grad_() for x in (*(x.to(dtype) for x in (q, F.normalize(k, dim=-1), v)), *gates)]
