"""The language model as transformers knows it, and the loss without logits."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from models import loss
from models.cache import Cache
from models.language_model import LanguageModel, LanguageModelConfig
from tests.laws.presets import PRESETS, change, marked, recipe

every_preset = pytest.mark.parametrize("preset", marked(PRESETS))
ALL = "all"  # in the pattern of a model of three layers, which has the first three


def model(*presets: str, **settings) -> LanguageModel:
    torch.manual_seed(0)
    mixers = {name: recipe(name) for name in presets}
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_layers": 3, **settings}
    return LanguageModel(LanguageModelConfig(mixers=mixers, pattern=list(presets), **sizes)).double().eval()


def tokens(B: int = 2, T: int = 40) -> torch.Tensor:
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))


@every_preset
def test_saved_and_loaded_it_is_the_same(preset, tmp_path):
    m = model(preset).float()
    m.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, m(tokens()).logits)
    assert again.head.weight is again.embedding.weight


def test_a_checkpoint_can_name_only_our_classes():
    config = LanguageModelConfig(mixers={"main": {"_target_": "torch.nn.Linear"}}, pattern=["main"])
    with pytest.raises(ValueError, match=r"torch\.nn\.Linear is not allowed"):
        LanguageModel(config)


@pytest.mark.parametrize("preset", [*marked(PRESETS), ALL])
def test_generate_is_the_likeliest_continuation(preset):
    """Greedy generation by states takes the likeliest token of a whole pass, which is one for all tokens, since none
    sees a later one (law 1); padding on the left changes nothing; beams take their states along, and are those that
    whole passes find."""
    m = model(*PRESETS) if preset == ALL else model(preset, num_layers=2)
    prompt = tokens(2, 7)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = m.generate(prompt, **settings)
    assert expected.shape == (2, 19) and torch.equal(expected[:, :7], prompt)
    with torch.no_grad():
        assert torch.equal(m(expected).logits[:, 6:-1].argmax(-1), expected[:, 7:])
    padded = F.pad(prompt, (5, 0), value=3)
    mask = F.pad(torch.ones_like(prompt), (5, 0))
    assert torch.equal(m.generate(padded, attention_mask=mask, **settings)[:, 12:], expected[:, 7:])
    beams = [m.generate(prompt, num_beams=3, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*beams)


def nats(m: LanguageModel, ids: torch.Tensor) -> float:
    return m.sum_nats(ids[:, :-1], ids[:, 1:]).item()


def test_a_recurrent_state_has_constant_size():
    m = model("gated_delta")
    sizes = [m(tokens(1, T), use_cache=True).past_key_values.num_bytes for T in (5, 50, 500)]
    assert len(set(sizes)) == 1
    grown = [model("softmax")(tokens(1, T), use_cache=True).past_key_values.num_bytes for T in (5, 50)]
    assert grown[1] > grown[0]


def test_padding_on_either_side_changes_no_logit():
    m = model(*PRESETS, num_layers=len(PRESETS))
    ids = tokens(2, 9)
    logits = m(ids).logits
    for pad in ((4, 0), (0, 4), (2, 3)):
        mask = F.pad(torch.ones_like(ids), pad)
        found = m(F.pad(ids, pad, value=5), attention_mask=mask).logits[:, pad[0] : pad[0] + 9]
        assert torch.allclose(found, logits, atol=1e-12)


def test_labels_are_shifted_inside():
    m = model("softmax")
    ids = tokens()
    logits = m(ids).logits[:, :-1]
    assert torch.allclose(m(ids, labels=ids).loss, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("size", [7, 64, 2**26])
def test_loss_in_chunks_is_cross_entropy(size, monkeypatch):
    """Value, both gradients and predictions, whatever the chunk; ignored targets count nothing."""
    monkeypatch.setattr(loss, "LOGITS", size * 61)
    torch.manual_seed(0)
    h, w = torch.randn(50, 32, dtype=torch.float64), torch.randn(61, 32, dtype=torch.float64)
    y = torch.randint(61, (50,))
    y[::7] = loss.IGNORED
    h.requires_grad_(), w.requires_grad_()
    expected = F.cross_entropy(h @ w.T, y, ignore_index=loss.IGNORED, reduction="sum")
    found = loss.sum_nats(h, w, y)
    assert torch.allclose(found, expected)
    for a, b in zip(torch.autograd.grad(3 * found, (h, w)), torch.autograd.grad(3 * expected, (h, w)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    each, predictions = loss.score(h, w, y)
    assert torch.allclose(each.sum(), expected)
    assert torch.equal(predictions, (h @ w.T).argmax(-1))


@every_preset
@pytest.mark.parametrize("hidden_size, heads", [(128, 4), (384, 6), (1024, 8), (2048, 16)])
def test_blocks_have_equal_parameters(preset, hidden_size, heads):
    """12 D^2 within 1 % whatever the mixer."""
    with torch.device("meta"):
        node = change(deepcopy(recipe(preset)), num_heads=heads)
        config = LanguageModelConfig(hidden_size=hidden_size, num_layers=1, mixers={"main": node}, pattern=["main"])
        block = LanguageModel(config).blocks[0]
    assert sum(p.numel() for p in block.parameters()) == pytest.approx(12 * hidden_size**2, rel=0.01)


def test_it_starts_at_the_uniform_loss():
    m = model("softmax")
    assert nats(m, tokens(4, 100)) / (4 * 99) == pytest.approx(math.log(61), rel=0.15)


def test_the_pattern_repeats_and_names_what_is_there():
    m = model("gated_delta", "softmax", num_layers=5)
    assert m.config.layers == ["gated_delta", "softmax", "gated_delta", "softmax", "gated_delta"]
    with pytest.raises(ValueError, match=r"'mesa'.*gated_delta"):
        LanguageModelConfig(mixers={"gated_delta": {}}, pattern=["mesa"]).layers  # noqa: B018


def test_cache_reorders():
    m = model(*PRESETS, num_layers=len(PRESETS))
    _, states = m.hidden(tokens())
    cache = Cache(states)
    before = [s.memory for s in states]
    cache.reorder_cache(torch.tensor([1, 1]))
    assert all(torch.equal(s.position, torch.tensor([40, 40])) for s in cache.states)
    assert type(cache.states[0].memory) is type(before[0])
