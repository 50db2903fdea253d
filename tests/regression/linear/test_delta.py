"""The delta rule's laws: what it is, that every form of it is the same, and that its extremes are finite."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.sizes import Sizes
from models.regression.chunks import unit_inverse
from models.regression.documents import forget_at_starts
from models.regression.linear.delta import Delta, chunked_delta, recurrent_delta
from models.regression.regressor import FORGET, Tokens

B, T, H, K, V = 2, 75, 3, 8, 6
NAMES = ("o", "memory", "dq", "dk", "dv", "dstep", "dlog_decay", "dmemory")


def draw(
    tokens: int = T, dtype: torch.dtype = torch.float64, seed: int = 0, width: int = K, heads: int = H
) -> list[Tensor]:
    """q, k, v, step_size in (0, 2), log_decay, memory."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    q, k = normal(B, tokens, heads, width), F.normalize(normal(B, tokens, heads, width), dim=-1)
    step_size, log_decay = 2 * normal(B, tokens, heads).sigmoid(), F.logsigmoid(normal(B, tokens, heads) + 2)
    return [q, k, normal(B, tokens, heads, V), step_size, log_decay, normal(B, heads, width, V)]


def values_and_gradients(form, inputs: list[Tensor | None]) -> dict[str, Tensor]:
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    o, memory = form(*leaves)
    g = torch.Generator().manual_seed(1)
    loss = sum((x.cpu() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in (o, memory))
    gradients = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    names = [n for n, x in zip(NAMES[2:], leaves, strict=True) if x is not None]
    return {"o": o, "memory": memory, **dict(zip(names, gradients, strict=True))}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.isfinite(b[name]).all(), name
        error = (a[name] - b[name]).abs().max() / max(1.0, a[name].abs().max())
        assert error < tolerance, f"{name}: {error:.1e}"


# What it is


def test_an_update_is_one_gradient_step_on_the_stated_objective():
    q, k, v, step_size, log_decay, memory = draw(1)
    decayed = (log_decay[:, 0, :, None, None].exp() * memory).requires_grad_()
    loss = 0.5 * (v[:, 0, :, None] - k[:, 0, :, None] @ decayed).square().sum()
    (gradient,) = torch.autograd.grad(loss, decayed)
    _, after = recurrent_delta(q, k, v, step_size, log_decay, memory)
    torch.testing.assert_close(after, decayed - step_size[:, 0, :, None, None] * gradient, rtol=0, atol=1e-12)


def test_the_plain_rule_is_attention_over_the_solution_of_a_triangular_system():
    q, k, v, step_size, *_ = draw()
    o, _ = recurrent_delta(q, k, v, step_size)
    q, k, v, b = (x.transpose(1, 2) for x in (q, k, v, step_size.unsqueeze(-1)))
    u = torch.linalg.solve_triangular(torch.eye(T) + (b * k @ k.mT).tril(-1), b * v, upper=False, unitriangular=True)
    torch.testing.assert_close(o, ((q @ k.mT).tril() @ u).transpose(1, 2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", [recurrent_delta, chunked_delta])
def test_no_decay_is_a_decay_of_one(form):
    q, k, v, step_size, log_decay, memory = draw()
    plain = values_and_gradients(form, [q, k, v, step_size, None, memory])
    one = values_and_gradients(form, [q, k, v, step_size, torch.zeros_like(log_decay), memory])
    one.pop("dlog_decay")
    assert_same(plain, one)


def test_a_step_of_one_stores_the_value_and_a_zero_key_writes_nothing():
    _, k, v, step_size, log_decay, memory = draw(1)
    o, _ = recurrent_delta(k, k, v, torch.ones_like(step_size), log_decay, memory)
    torch.testing.assert_close(o, v)
    for form in (recurrent_delta, chunked_delta):
        _, after = form(k, torch.zeros_like(k), v, step_size, torch.zeros_like(log_decay), memory)
        assert torch.equal(after, memory)


# Every form is the same


@pytest.mark.parametrize("tokens, chunk", [(75, 32), (64, 64), (75, 16), (75, 7), (75, 1), (5, 64), (1, 32), (130, 64)])
def test_chunked_is_recurrent(tokens, chunk):
    inputs = draw(tokens)
    form = values_and_gradients(lambda *x: chunked_delta(*x, chunk=chunk), inputs)
    assert_same(values_and_gradients(recurrent_delta, inputs), form)


def test_chunked_without_decay_or_memory_is_recurrent():
    inputs = [*draw()[:4], None, None]
    assert_same(values_and_gradients(recurrent_delta, inputs), values_and_gradients(chunked_delta, inputs))


@pytest.mark.parametrize("by_channel", [False, True])
def test_keys_of_one_channel(by_channel):
    """Whose decay by channel is a number a head, too."""
    inputs = draw(width=1)
    inputs[4] = inputs[4].unsqueeze(-1) if by_channel else inputs[4]
    assert_same(values_and_gradients(recurrent_delta, inputs), values_and_gradients(chunked_delta, inputs))


def test_the_gradient_written_by_hand_is_the_numerical_one():
    inputs = [x[:1, :, :1].clone().requires_grad_() if i < 5 else x[:1, :1] for i, x in enumerate(draw(9, width=3))]
    inputs[5] = inputs[5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: chunked_delta(*x, chunk=4), inputs)


@pytest.mark.parametrize("cut", [1, 32, 50, 74])
def test_any_split_is_the_whole(cut):
    def in_two(q, k, v, step_size, log_decay, memory):
        first, memory = chunked_delta(*(x[:, :cut] for x in (q, k, v, step_size, log_decay)), memory)
        last, memory = recurrent_delta(*(x[:, cut:] for x in (q, k, v, step_size, log_decay)), memory)
        return torch.cat((first, last), dim=1), memory

    inputs = draw()
    assert_same(values_and_gradients(chunked_delta, inputs), values_and_gradients(in_two, inputs))


@pytest.mark.parametrize("form", [recurrent_delta, lambda *x: chunked_delta(*x, chunk=64)])
def test_forget_separates_documents(form):
    cuts = (0, 3, 4, 40, T)

    def separately(q, k, v, step_size, log_decay, memory):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            parts.append(form(*(x[:, start:stop] for x in (q, k, v, step_size, log_decay)), None if start else memory))
        return torch.cat([o for o, _ in parts], dim=1), parts[-1][1]

    def packed(q, k, v, step_size, log_decay, memory):
        segments = torch.bucketize(torch.arange(T), torch.tensor(cuts[1:-1]), right=True).expand(B, T)
        return form(q, k, v, step_size, forget_at_starts(log_decay, segments), memory)

    def without_gates_of_first_tokens(results):  # their gradient is zero packed; apart, they fade an empty memory
        results["dlog_decay"] = results["dlog_decay"].clone()
        results["dlog_decay"][:, list(cuts[1:-1])] = 0
        return results

    def run(f):
        inputs = draw()
        leaves = [x.requires_grad_() for x in inputs]
        o, memory = f(*leaves)
        loss = o.square().sum() + memory.sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        return {"o": o, "memory": memory, **dict(zip(NAMES[2:], gradients, strict=True))}

    assert_same(without_gates_of_first_tokens(run(separately)), run(packed))


def test_many_documents_in_a_chunk_keep_the_digits_of_float32():
    inputs = draw(64)
    inputs[4] = inputs[4].clone()
    inputs[4][:, 1::3] = FORGET
    exact = values_and_gradients(recurrent_delta, inputs)
    form = values_and_gradients(lambda *x: chunked_delta(*x, chunk=64), [x.float() for x in inputs])
    assert_same(exact, form, 3e-6)


@pytest.mark.slow
def test_equals_the_peers_chunked_form():
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, step_size, log_decay, memory = draw(dtype=torch.float32)
    wrapped = modeling.torch_chunk_gated_delta_rule
    peer = unwrap(wrapped)
    o, after = peer(q, k, v, log_decay, step_size, initial_state=memory, output_final_state=True)
    ours, ours_after = chunked_delta(q * K**-0.5, k, v, step_size, log_decay, memory)
    torch.testing.assert_close(ours, o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_after, after, rtol=1e-5, atol=1e-5)


def unwrap(function):
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


# Extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", ["random", "zero", "repeated"])
@pytest.mark.parametrize("step", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("decay", [0.0, -1e-3, FORGET, -1e4, float("-inf")])
def test_finite_and_the_recurrence_at_the_extremes(dtype, key, step, decay):
    q, k, v, step_size, log_decay, memory = draw()
    k = {"random": k, "zero": torch.zeros_like(k), "repeated": k[:, :1].expand_as(k)}[key]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    step_size, log_decay = torch.full_like(step_size, step).float(), log_decay.float()
    log_decay[:, ::2] = decay
    inputs = [q, k, v, step_size, log_decay, memory.float()]
    form = values_and_gradients(lambda *x: chunked_delta(*x, chunk=64), inputs)
    assert form["o"].dtype == dtype and form["memory"].dtype == torch.float32
    assert_same(values_and_gradients(recurrent_delta, inputs), form, 2e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("size", [1, 4, 7, 16, 32, 64])
def test_unit_inverse(size):
    A = torch.randn(5, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul_(0.3).tril_(-1)
    torch.testing.assert_close(unit_inverse(A) @ (torch.eye(size) + A), torch.eye(size, dtype=A.dtype).expand_as(A))


def test_unit_inverse_is_accurate_where_keys_repeat_and_steps_reflect():
    g = torch.Generator().manual_seed(0)
    k = F.normalize(torch.randn(50, 1, 64, generator=g) + 0.02 * torch.randn(50, 64, 64, generator=g), dim=-1)
    A = (2 * k @ k.mT).tril(-1)
    exact = torch.linalg.inv(A.double() + torch.eye(64))
    assert (unit_inverse(A) - exact).abs().max() < 1e-4  # solving by rows errs by 1e-5 to 2e-4, from library to library


def test_autocast_and_checkpoint_change_nothing():
    inputs = draw(dtype=torch.float32)
    expected = values_and_gradients(chunked_delta, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward pass too
        assert_same(expected, values_and_gradients(chunked_delta, inputs), 1e-12)

    def checkpointed(*x):
        return torch.utils.checkpoint.checkpoint(chunked_delta, *x, use_reentrant=False)

    assert_same(expected, values_and_gradients(checkpointed, inputs), 1e-12)


# The module


def module_and_inputs(**options) -> tuple[Delta, list[Tensor]]:
    torch.manual_seed(0)
    module = Delta(Sizes(12, H, H, K, V), **options).double()
    q, k, v, _, log_decay, _ = draw()
    return module, [torch.randn(B, T, 12, dtype=torch.float64), q, k, v, log_decay]


def test_backends_and_decoding_agree():
    module, inputs = module_and_inputs(backend="torch", negative_eigenvalues=True)
    twin = copy.deepcopy(module)
    twin.backend = "recurrent"
    segments = (torch.arange(T) // 20).expand(B, T)
    o, state = module(Tokens(*inputs, segments))
    torch.testing.assert_close(twin(Tokens(*inputs, segments))[0], o, rtol=0, atol=1e-10)
    first, part = module(Tokens(*(x[:, :70] for x in inputs), segments[:, :70]))
    steps = [first]
    for t in range(70, T):
        step, part = module(Tokens(*(x[:, t : t + 1] for x in inputs)), part)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, dim=1), o, rtol=0, atol=1e-10)
    torch.testing.assert_close(part, state, rtol=0, atol=1e-10)


def test_documents_without_a_decay_are_separate():
    module, (x, q, k, v, _) = module_and_inputs()
    segments = (torch.arange(T) >= 30).long().expand(B, T)
    o, state = module(Tokens(x, q, k, v, segments=segments))
    alone, alone_state = module(Tokens(x[:, 30:], q[:, 30:], k[:, 30:], v[:, 30:]))
    torch.testing.assert_close(o[:, 30:], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, alone_state, rtol=0, atol=1e-10)


def test_refusals_name_the_setting():
    with pytest.raises(ValueError, match=r"regressor\.chunk=0"):
        Delta(Sizes(12, H, H, K, V), chunk=0)
    with pytest.raises(ValueError, match=r"regressor\.backend=triton can't run Delta"):
        Delta(Sizes(12, H, H, K, V), backend="triton").choose(torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"regressor\.backend=fla can't run Delta here: Triton needs a GPU"):
        Delta(Sizes(12, H, H, K, V), backend="fla").choose(torch.device("cpu"), torch.float32)
    assert Delta(Sizes(12, H, H, K, V)).choose(torch.device("cpu"), torch.float32).backend == "torch"
