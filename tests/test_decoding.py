"""One token's step: what is captured on a GPU is run as it is on a CPU, and is the model called layer by layer. Beside
a test is where people met its case."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import decoding
from models.cache import Cache
from models.decoding import step as steps
from models.decoding.held import Held, leaves
from models.language_model import PIECE, LanguageModel
from scripts.evaluating.writing import Writer, greedy
from tests.laws.presets import PRESETS, marked
from tests.test_calls import IDS, model

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)
# for the host, in one token's step
WAITS = (
    "atlas",
    "memora",
    "mesa",
    "moneta",
    "nystrom",
    "tnt",
    "titans_mac",
    "titans_mlp",
    "ttt_linear",
    "ttt_mlp",
    "yaad",
)


class Waits(TorchDispatchMode):
    """What has run inside and made the host wait, if the tensors were a GPU's."""

    SYNCHRONOUS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.__name__.split(".")[0] in self.SYNCHRONOUS:
            self.found.append(operator.__name__)
        return operator(*args, **(kwargs or {}))


def recurrent(preset: str, **settings) -> LanguageModel:
    m = model(preset, num_layers=1, **settings).eval()
    if m.state_size(8) != m.state_size(9):
        pytest.skip("its states grow")
    return m


def logits_of(go_on: Callable[[Tensor, Cache], tuple[Tensor, Cache]], cache: Cache) -> Tensor:
    found = []
    for i in range(12, 17):
        logits, cache = go_on(IDS[:, i : i + 1], cache)
        found.append(logits)
    return torch.cat(found, 1)


def layers_of(m: LanguageModel) -> Callable[[Tensor, Cache], tuple[Tensor, Cache]]:
    def go_on(ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        out = m(ids, past_key_values=cache, use_cache=True)
        return out.logits, out.past_key_values

    return go_on


@pytest.mark.parametrize("preset", marked(PRESETS))
@torch.no_grad()
def test_a_step_is_the_model(preset):
    m = recurrent(preset)
    cache = m(IDS[:, :12], use_cache=True).past_key_values
    step = steps.Step(m, IDS[:, :1], cache)
    torch.testing.assert_close(logits_of(step, cache), logits_of(layers_of(m), cache), rtol=0, atol=1e-12)
    with Waits() as waits:
        step.run()
    assert bool(waits.found) == (preset in WAITS), waits.found


@pytest.mark.parametrize("preset", ["gated_delta", "titans", "kda"])
@torch.no_grad()
def test_a_step_has_the_casts_of_autocast(preset):
    """To the last bit, from weights that are cast once."""
    m = recurrent(preset).float()
    with torch.autocast("cpu", torch.bfloat16):
        cache = m(IDS[:, :12], use_cache=True).past_key_values
        step = steps.Step(m, IDS[:, :1], cache)
        assert step.weights.copies["blocks.0.mixer.projection.weight"].dtype == torch.bfloat16
        assert "embedding.weight" not in step.weights.copies
        assert torch.equal(logits_of(step, cache), logits_of(layers_of(m), cache))


@pytest.fixture
def replays(monkeypatch) -> Iterator[list[int]]:
    """Steps are taken on a CPU too. Each adds the number of its rows."""
    call, found = steps.Step.__call__, []

    def counted(self, ids, cache):
        found.append(len(ids))
        return call(self, ids, cache)

    def anywhere(ids: Tensor) -> str | None:
        return None if steps._ALLOWED.get() and not torch.is_grad_enabled() else "not here"

    monkeypatch.setattr(steps, "refusal_of_call", anywhere)
    monkeypatch.setattr(steps.Step, "__call__", counted)
    yield found
    steps._STEPS.clear()


def generated(m: LanguageModel, rows: int, **settings) -> Any:
    """Of rows whose texts have different lengths, padded on the left."""
    ids, mask = IDS[:, :12].repeat(-(-rows // 2), 1)[:rows].to(m.device), torch.ones(rows, 12, dtype=torch.long)
    mask[0, :5] = 0
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask.to(m.device)} | settings
    torch.manual_seed(0)
    return m.generate(ids, **given, return_dict_in_generate=True, output_logits=True, output_scores=True)


def assert_alike(found: Any, wanted: Any) -> None:
    """The same texts on a CPU, in float64. On a GPU, in float32, tokens may be as likely as each other; there the same
    logits after each token, as long as the text is the same, and the same sums of beams.
    """
    if not found.sequences.is_cuda:
        assert torch.equal(found.sequences, wanted.sequences)
    elif "sequences_scores" in found:
        torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, rtol=1e-3, atol=1e-3)
    else:
        same = torch.ones(len(found.sequences), dtype=torch.bool, device=found.sequences.device)
        for t, (a, b) in enumerate(zip(found.logits, wanted.logits, strict=True)):
            torch.testing.assert_close(a[same], b[same], rtol=1e-3, atol=1e-3, msg=lambda m, t=t: f"token {t}: {m}")
            same &= found.sequences[:, 12 + t] == wanted.sequences[:, 12 + t]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("preset", ["gated_delta", "titans", "kda"])
def test_generate_goes_on_by_steps(preset, device, replays):
    """Whatever the batch; with beams, samples and weights that have changed; with two models in turn."""
    m, other = (recurrent(preset).to(device, torch.float64 if device == "cpu" else torch.float32) for _ in range(2))
    with torch.no_grad():
        other.embedding.weight.mul_(-1)
    for rows in (2, 3, 1, 2):
        wanted = generated(m, rows, disable_compile=True)
        assert not replays
        assert_alike(generated(m, rows), wanted)
        assert replays == 5 * [rows]
        replays.clear()
    for settings in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}):
        assert_alike(generated(m, 2, **settings), generated(m, 2, **settings, disable_compile=True))
        assert replays == 5 * [6]
        replays.clear()
    before = generated(m, 2)
    assert_alike(generated(other, 2), generated(other, 2, disable_compile=True))
    with torch.no_grad():
        m.head.weight.copy_(m.head.weight.flip(0))
        m.blocks[0].mixer.projection.weight.mul_(0.5)
    after, step = generated(m, 2), steps._STEPS[m]
    assert_alike(after, generated(m, 2, disable_compile=True))
    assert not torch.equal(after.sequences, before.sequences)
    m.embedding.weight = m.head.weight = torch.nn.Parameter(m.embedding.weight * 2)
    assert step.weights.moved
    assert_alike(generated(m, 2), generated(m, 2, disable_compile=True))
    step = steps._STEPS[m]
    m.blocks[0].feed_forward.output = deepcopy(m.blocks[0].feed_forward.up).requires_grad_(False)
    assert step.weights.moved
    m.train()
    assert m not in steps._STEPS and other in steps._STEPS


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_a_step_changes_no_cache_that_it_is_given(device, replays):
    """As people go on from one prompt in several ways (huggingface/transformers issue 34232). Two texts take turns."""
    m, ids = recurrent("titans").to(device), IDS.to(device)
    prompts = [m(ids[i : i + 1, :9], use_cache=True).past_key_values for i in (0, 1)]
    caches, texts = list(prompts), [[], []]
    for t in range(9, 13):
        for i in (0, 1):
            before = caches[i]
            token = ids[i : i + 1, t : t + 1]
            out = m(token, past_key_values=before, use_cache=True)
            copied, again = deepcopy(before), m(token, past_key_values=before, use_cache=True)
            torch.testing.assert_close(again.logits, out.logits)
            torch.testing.assert_close(m(token, past_key_values=copied, use_cache=True).logits, out.logits)
            caches[i], texts[i] = out.past_key_values, [*texts[i], out.logits]
    assert len(replays) == 24 and isinstance(caches[0], Held)
    for i in (0, 1):
        whole = m(ids[i : i + 1, :13], use_cache=True)
        torch.testing.assert_close(torch.cat(texts[i], 1), whole.logits[:, 9:])
        for a, b in zip(leaves(caches[i].states), leaves(whole.past_key_values.states), strict=True):
            torch.testing.assert_close(a, b)
        assert caches[i].batch_size == 1 and caches[i].seen == 13
    chosen = m(ids[:, :9], use_cache=True).past_key_values
    chosen = m(ids[:, 9:10], past_key_values=chosen, use_cache=True).past_key_values
    chosen.reorder_cache(torch.tensor([1, 1], device=device))
    rows = m(ids[:, 10:11].flip(0), past_key_values=chosen, use_cache=True).logits
    torch.testing.assert_close(rows[:1], texts[1][1])
    chosen.batch_repeat_interleave(2)
    assert chosen.batch_size == 4


def test_a_step_is_for_tokens_that_go_on(replays):
    """Gradients, hidden states, documents and hooks ask for the layers."""
    m = recurrent("gated_delta")
    cache = m(IDS[:, :9], use_cache=True).past_key_values
    given = {"input_ids": IDS[:, 9:10], "past_key_values": cache, "use_cache": True}
    m(**given)
    with torch.no_grad():
        m(**given, output_hidden_states=True)
        m(**given, labels=IDS[:, 9:10])
        m(**given, position_ids=torch.zeros(1, 1, dtype=torch.long))
        with decoding.uncaptured():
            m(**given)
        hook = m.blocks[0].register_forward_hook(lambda *_: None)
        m(**given)
        assert "hooks" in decoding.refusal(m, IDS[:, :1], cache)
        hook.remove()
        assert not replays
        m(**given)
        assert replays == [2]
        replays.clear()
        prompt = {"input_ids": IDS[:, :9], "use_cache": True, "logits_to_keep": 1}
        with m.blocks[0].register_forward_hook(lambda *_: None):
            given["past_key_values"] = m(**prompt).past_key_values
            assert type(given["past_key_values"]) is Cache and m(**given).past_key_values.seen == 10
        given["past_key_values"] = m(**prompt).past_key_values
        with m.blocks[0].register_forward_hook(lambda *_: None):
            m(**given)
        assert isinstance(given["past_key_values"], Held) and not replays
        grown = model("softmax", num_layers=1)(IDS, use_cache=True).past_key_values
        assert "grow" in decoding.refusal(model("softmax", num_layers=1), IDS[:, :1], grown)
        adapter = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
        m.blocks[0].mixer.output = adapter(32, 32)
        assert "adapter" in decoding.refusal(m, IDS[:, :1], cache)


def test_a_step_that_can_not_be_captured_is_told_once(replays, monkeypatch):
    def refused(self, *_):
        raise steps.HostNeededError("a layer's step waits for the host")

    m = recurrent("gated_delta")
    wanted = generated(m, 2, disable_compile=True)
    monkeypatch.setattr(steps.Step, "_run", refused)
    monkeypatch.setattr(steps.Step, "__init__", refused)
    with pytest.warns(UserWarning, match="decoded layer by layer: a layer's step waits for the host") as told:
        assert_alike(generated(m, 2), wanted)
    assert len(told) == 1 and not replays


def test_the_writer_goes_on_by_steps(replays):
    m = recurrent("gated_delta")
    writer = Writer(m, None, greedy)
    writer.read(IDS[0].tolist())
    with decoding.uncaptured():
        wanted = list(writer.write(6))
    writer.forget()
    writer.read(IDS[0].tolist())
    assert list(writer.write(6)) == wanted and replays == 5 * [1]


@torch.no_grad()
def test_a_cache_holds_no_more_than_its_states():
    """The last tokens of a prompt were a view of all its tokens: 9.7 GB of 14.9 at 64 x 1,024."""
    for preset in ("gated_delta", "sliding_window"):
        cache = model(preset)(IDS, use_cache=True).past_key_values
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves(cache.states)}
        assert sum(held.values()) <= cache.num_bytes


@torch.no_grad()
def test_the_states_of_a_prompt_lie_where_the_step_finds_them(replays, monkeypatch):
    """And are held once. A step's copies of weights are those of now; where another cache lies nothing is written."""
    m, ids = recurrent("gated_delta").double(), IDS[:, :12]
    generated(m, 2, attention_mask=torch.ones(2, 12))
    step = steps._STEPS[m]
    m.blocks[0].mixer.projection.weight.mul_(0.5)
    with decoding.uncaptured():
        plain = m(ids, use_cache=True, logits_to_keep=1)
        expected = logits_of(layers_of(m), plain.past_key_values)
    monkeypatch.setattr(m, "piece", lambda given: 5)
    first = m(ids, use_cache=True, logits_to_keep=1)
    cache = first.past_key_values
    assert isinstance(cache, Held) and step.buffers.owned_by(cache)
    second = m(ids.flip(1), use_cache=True, logits_to_keep=1).past_key_values
    assert not isinstance(second, Held) and step.buffers.owned_by(cache)
    torch.testing.assert_close(first.logits, plain.logits)
    torch.testing.assert_close(logits_of(step, cache), expected)
    assert isinstance(m(ids[:1], use_cache=True, logits_to_keep=1).past_key_values, Cache)
    del cache, first
    with pytest.raises(ValueError), decoding.places(m, ids) as found:
        assert found is step and not step.awaits(ids) and not step.fits(second, ids[:, :1])
        raise ValueError
    assert step.awaits(ids) and m(ids, use_cache=False, logits_to_keep=1).past_key_values is None
    assert step.buffers.owner is None or step.buffers.owner() is None


@torch.no_grad()
def test_the_cache_of_a_prompt_is_copied_and_kept_as_any(replays):
    """In a file too, for a prompt that many texts begin with."""
    m, ids = recurrent("gated_delta").double(), IDS[:, :12]
    for kind in (Cache, Held):
        cache = m(ids, use_cache=True, logits_to_keep=1).past_key_values
        assert type(cache) is kind
        for copied in (copy(cache), pickle.loads(pickle.dumps(cache))):
            assert type(copied) is Cache and copied.seen == 12
            torch.testing.assert_close(leaves(copied.states), leaves(cache.states))
        del cache, copied
        generated(m, 2, attention_mask=torch.ones(2, 12))


@torch.no_grad()
def test_weights_are_cast_anew_for_the_first_token_after_a_prompt(replays):
    """Those that were changed through .data, which no version tells, too."""
    m = recurrent("gated_delta").float()
    with torch.autocast("cpu", torch.bfloat16):
        generated(m, 2, attention_mask=torch.ones(2, 12))
        cache = m(IDS[:, :12], use_cache=True, logits_to_keep=1).past_key_values
    assert isinstance(cache, Held)
    m.head.weight.data.mul_(1.5)
    given = {"input_ids": IDS[:, 12:13], "past_key_values": cache, "use_cache": True}
    with torch.autocast("cpu", torch.bfloat16):
        found = m(**given).logits
        with decoding.uncaptured():
            assert torch.equal(m(**given).logits, found)


@torch.no_grad()
def test_a_token_beside_another_threads_prompt_goes_by_layers(replays):
    """Rather than by a step that would be captured in the place of the one that the prompt is for."""
    m = recurrent("gated_delta")
    generated(m, 2, attention_mask=torch.ones(2, 12))
    step, cache = steps._STEPS[m], m(IDS[:, :9], use_cache=True).past_key_values
    replays.clear()
    with decoding.places(m, IDS[:, :9]) as found:
        assert found is step
        m(IDS[:, 9:10], past_key_values=cache, use_cache=True)
        assert not replays and steps._STEPS[m] is step
    m(IDS[:, 9:10], past_key_values=cache, use_cache=True)
    assert replays == [2] and steps._STEPS[m] is step


@torch.no_grad()
def test_a_step_waits_while_another_threads_beams_are_chosen(replays):
    """Or what was chosen would be written over the states of the step's own text."""
    m = recurrent("gated_delta").double()
    mine, others = (m(ids, use_cache=True).past_key_values for ids in (IDS[:, :9], IDS[:, 9:18]))
    with decoding.uncaptured():
        expected = [logits_of(layers_of(m), cache) for cache in (mine, others)]
    mine = m(IDS[:, 12:13], past_key_values=mine, use_cache=True).past_key_values
    found: list[Any] = []
    go_on = torch.no_grad()(lambda: found.append(layers_of(m)(IDS[:, 12:13], others)))
    thread = threading.Thread(target=go_on)

    def chosen(x: Tensor) -> Tensor:
        if thread.ident is None:
            thread.start()
            thread.join(0.5)
        return x.flip(0)

    mine._map(chosen)
    thread.join()
    second = layers_of(m)(IDS[:, 13:14], found[0][1])[0]
    torch.testing.assert_close(torch.cat([found[0][0], second], 1), expected[1][:, :2])
    second = layers_of(m)(IDS[:, 13:14].flip(0), mine)[0]
    torch.testing.assert_close(second.flip(0), expected[0][:, 1:2])


def test_pieces_are_alike_and_not_larger_than_a_gpu_needs():
    m = recurrent("gated_delta")
    for rows, length in ((64, 1024), (1, 1024), (1, 65536), (16, 16384), (100_000, 64), (2, 0)):
        size = m.piece(SimpleNamespace(shape=(rows, length), is_cuda=True))
        count = -(-length // size)
        assert rows * size <= max(PIECE + 16 * rows, 64 * rows) and size % 16 == 0
        assert size == 64 or count * size < length + 16 * count
    assert m.piece(SimpleNamespace(shape=(64, 1024), is_cuda=False)) == 1024


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_prompt_of_vectors_is_left_as_it_was():
    """Where a step was captured, the layers write their sums over what they were given."""
    m, ids = recurrent("gated_delta").float().cuda(), IDS[:, :12].cuda()
    generated(m, 2, attention_mask=torch.ones(2, 12, device="cuda"))
    assert isinstance(steps._STEPS[m], steps.Step)
    vectors = m.embedding(ids)
    before = vectors.clone()
    found = m(inputs_embeds=vectors, use_cache=True, logits_to_keep=1)
    with decoding.uncaptured():
        expected = m(input_ids=ids, use_cache=True, logits_to_keep=1)
    assert isinstance(found.past_key_values, Held) and vectors.equal(before)
    torch.testing.assert_close(found.logits, expected.logits)


@torch.no_grad()
def test_a_prompt_in_pieces_is_the_prompt(monkeypatch):
    """Its last logits and its states; padding on the left included."""
    mask = torch.ones(2, 20)
    mask[0, :9] = 0
    for preset in ("gated_delta", "softmax"):
        m = model(preset).eval()
        given = {"attention_mask": mask, "use_cache": True, "logits_to_keep": 1}
        whole = m(IDS, **given)
        monkeypatch.setattr(m, "piece", lambda given: 8)
        found = m(IDS, **given)
        torch.testing.assert_close(found.logits, whole.logits)
        for a, b in zip(*(leaves(out.past_key_values.states) for out in (found, whole)), strict=True):
            torch.testing.assert_close(a, b)
