"""The feed-forward layer that learns in context: what it computes, in every form, in every call, and in a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.block import Block, InPlace, SwiGLU, feed_forward
from models.cache import leaves
from models.decoding import step as steps
from models.language_model import LanguageModel, LanguageModelConfig
from models.regression.linear.in_place import recurrent_in_place
from models.training.summary import summary
from tests.laws.presets import HIDDEN, inputs, largest_difference, mixer, recipe
from tests.test_decoding import GPU

INNER, BATCH, T = 24, 5, 23
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 12 + [2] * 8, [4] * 11 + [5] + [7] * 11])
every_row = pytest.mark.parametrize("segments", [None, DOCUMENTS], ids=["whole", "documents"])


def layer(**settings) -> InPlace:
    """With a target of its own: at the start there is none."""
    torch.manual_seed(0)
    made = InPlace(HIDDEN, INNER, **{"grad_batch": BATCH} | settings).double()
    made.taps.data = 0.3 * torch.randn(made.taps.shape, dtype=torch.float64)
    return made


def in_calls(m: InPlace, x, splits=(), segments=None):
    ys, state = [], None
    for i, j in zip((0, *splits), (*splits, x.shape[1]), strict=True):
        y, state = m(x[:, i:j], state, None if segments is None else segments[:, i:j])
        ys.append(y)
    return torch.cat(ys, 1), state


def token_by_token(m: InPlace, x, segments=None):
    a, b = m.up(x).chunk(2, dim=-1)
    z = F.silu(a) * b
    reads, state = recurrent_in_place(x, z, m.taps, m.target, m.grad_batch, segments=segments)
    return m.output(z) + m.step_size * reads, state


def outcome(form, m, x, *given):
    """Outputs, the state, and the gradients of a function of both."""
    x = x.clone().requires_grad_()
    y, state = form(m, x, *given)
    held = [y, *(part for part in leaves(state) if part.is_floating_point())]
    total = sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in held)
    return [y, *(part.double() for part in leaves(state)), *torch.autograd.grad(total, (x, *m.parameters()))]


@every_row
@pytest.mark.parametrize("splits", [(), (1,), (7,), (5, 10), (2, 3, 4, 13, 14, 20), tuple(range(1, T))], ids=str)
def test_every_form_and_every_split_is_one_map(splits, segments):
    m, x = layer(), inputs(2, T)
    defined = outcome(token_by_token, m, x, segments)
    assert largest_difference(outcome(in_calls, m, x, splits, segments), defined) < 1e-10


def test_documents_are_separate_sequences():
    m, x = layer(), inputs(2, T)
    y = m(x, None, DOCUMENTS)[0]
    for row in range(2):
        for number in DOCUMENTS[row].unique():
            own = DOCUMENTS[row] == number
            assert torch.allclose(y[row, own], m(x[row, own].unsqueeze(0))[0][0], rtol=0, atol=1e-12)


def test_it_is_causal():
    m, x = layer(), inputs(2, T)
    y = m(x)[0]
    for t in (1, 4, 5, 17):
        changed = x.clone()
        changed[:, t] += 1
        assert torch.equal(m(changed)[0][:, :t], y[:, :t])


def test_it_is_a_gradient_step_after_every_mini_batch():
    """M <- M - eta dL/dM of L = -sum (z_i M) . v_i, by autograd; the values by torch's convolution, which pads each
    mini-batch with zeros, as the published code does."""
    m, x = layer(step_size=0.7), inputs(1, T)
    a, b = m.up(x).chunk(2, dim=-1)
    z, M, found = F.silu(a) * b, m.output.weight.T, []
    for begin in range(0, T, BATCH):
        now = slice(begin, begin + BATCH)
        found.append(z[0, now] @ M)
        near = F.conv1d(x[:, now].mT, m.taps.unsqueeze(1), padding=2, groups=HIDDEN)
        v, at = m.target(near[0].T), M.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(-((z[0, now] @ at) * v).sum(), at)
        M = M - 0.7 * gradient
    torch.testing.assert_close(m(x)[0][0], torch.cat(found), rtol=0, atol=1e-12)


def test_without_a_step_and_at_its_start_it_is_swiglu():
    m, x = layer(step_size=0.0), inputs(2, T)
    plain = SwiGLU(HIDDEN, INNER).double()
    plain.load_state_dict({name: w for name, w in m.state_dict().items() if name in plain.state_dict()})
    assert torch.equal(m(x)[0], plain(x))
    fresh = InPlace(HIDDEN, INNER, grad_batch=BATCH).double()
    fresh.load_state_dict({**plain.state_dict(), "target.weight": m.target.weight, "taps": fresh.taps})
    assert torch.equal(fresh(x)[0], plain(x))


def test_a_long_call_goes_by_way_of_the_state(monkeypatch):
    m, x = layer(), inputs(2, T)
    whole = m(x, None, DOCUMENTS, keep=False)
    assert whole[1] is None
    monkeypatch.setattr(InPlace, "PIECE", 6)
    torch.testing.assert_close(m(x, None, DOCUMENTS, keep=False)[0], whole[0], rtol=0, atol=1e-12)


def test_what_it_holds_and_counts():
    m = feed_forward("in_place", HIDDEN, mixer("gated_delta"))
    block = Block(HIDDEN, mixer("gated_delta"), m, 1e-6)
    state = m(torch.randn(1, 70, HIDDEN))[1]
    assert m.state_size() == sum(y.numel() for y in (state.written, state.present, state.z, state.x))
    assert block.state_size(70) == m.state_size() + block.mixer.state_size(70)
    assert block.flops_per_token(70) == m.flops_per_token() + block.mixer.flops_per_token(70)
    assert m.flops_per_token() == SwiGLU(HIDDEN, m.inner_size).flops_per_token() + 2 * HIDDEN * (HIDDEN + m.inner_size)


def model(*presets: str, **settings) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": HIDDEN, "num_layers": 2, "feed_forward_size": INNER}
    mixers = {name: recipe(name) for name in presets or ("gated_delta", "softmax")}
    own = {"feed_forward": "in_place", "feed_forward_grad_batch": BATCH} | settings
    m = LanguageModel(LanguageModelConfig(mixers=mixers, pattern=[*mixers], **sizes, **own)).double().eval()
    for block in m.blocks:
        if block.learns:
            block.feed_forward.taps.data.normal_(std=0.3)
    return m


def test_a_model_generates_from_states_what_whole_passes_say(tmp_path):
    """Greedily and by beams, with padding on the left; and as it is saved."""
    m = model()
    prompt = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = m.generate(prompt, **settings)
    with torch.no_grad():
        assert torch.equal(m(expected).logits[:, 6:-1].argmax(-1), expected[:, 7:])
    padded, mask = F.pad(prompt, (5, 0), value=3), F.pad(torch.ones_like(prompt), (5, 0))
    assert torch.equal(m.generate(padded, attention_mask=mask, **settings)[:, 12:], expected[:, 7:])
    assert torch.equal(*(m.generate(prompt, num_beams=3, use_cache=cached, **settings) for cached in (True, False)))
    m.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path).double()
    assert torch.equal(again(expected).logits, m(expected).logits)


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_a_captured_step_is_the_model(device):
    """Of a model whose states do not grow."""
    m = model("gated_delta").to(device)
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1)).to(device)
    assert m.state_size(8) == m.state_size(9)
    cache = m(ids[:, :12], use_cache=True).past_key_values
    step, found = steps.Step(m, ids[:, :1], cache), []
    whole = m(ids).logits[:, 12:]
    for i in range(12, 20):
        logits, cache = step(ids[:, i : i + 1], cache)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-12)


def test_blocks_that_are_computed_again_are_the_same():
    ids = torch.randint(61, (2, T), generator=torch.Generator().manual_seed(1))
    found = []
    for again in (False, True):
        m = model().train()
        if again:
            m.gradient_checkpointing_enable()
        m.sum_nats(ids, ids.roll(-1, 1), DOCUMENTS).backward()
        found.append([p.grad for p in m.parameters()])
    assert largest_difference(*found) < 1e-12


def test_its_settings_elsewhere_are_refused():
    for given in ({"grad_batch": 8}, {"step_size": 0.1}):
        ((name, value),) = given.items()
        with pytest.raises(ValueError, match=rf"model\.feed_forward_{name}={value} is of model\.feed_forward=in_place"):
            feed_forward("swiglu", HIDDEN, mixer("softmax"), **given)


def test_a_mini_batch_as_long_as_the_sequence_is_told():
    sizes = {"vocab_size": 61, "hidden_size": HIDDEN, "num_layers": 1, "feed_forward_grad_batch": 8}
    mixers = {"main": recipe("sliding_window")}
    m = LanguageModel(LanguageModelConfig(mixers=mixers, pattern=["main"], feed_forward="in_place", **sizes))
    for seq_len, told in ((8, True), (9, False)):
        said = summary(m, seq_len, torch.device("cpu"), torch.float32)
        assert ("grad_batch=8: a layer that steps behind a mini-batch learns nothing within 8 tokens" in said) == told
