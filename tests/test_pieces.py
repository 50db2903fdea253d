"""A prompt's pieces: what is captured on a GPU is run as it is on a CPU, and is the prompt layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import decoding
from models.cache import leaves
from models.config import LanguageModelConfig
from models.decoding import graph, pieces
from models.decoding import step as steps
from models.decoding.held import Held
from models.language_model import PIECE, LanguageModel
from models.mixers.mixer import Mixer
from tests.laws import test_baselines
from tests.laws.presets import PRESETS, marked, part, recipe
from tests.test_calls import V, model
from tests.test_decoding import Waits, recurrent

IDS = torch.randint(1, V, (2, 90), generator=torch.Generator().manual_seed(1))
SIZES = (32, 32, 16)  # of a prompt's first tokens
OTHERS = ("in_place", "signed", *test_baselines.BASELINES)
WITHOUT = ("titans_mac",)  # a state after no token
# for the host, in a piece; some by the PyTorch form alone
WAITS = (
    "atlas",
    "comba",
    "leaky_lms",
    "memora",
    "mesa",
    "moneta",
    "nystrom",
    "rwkv7",
    "titans_mlp",
    "tnt",
    "ttt_linear",
    "ttt_mlp",
    "yaad",
)


def built(name: str) -> LanguageModel:
    """Of a preset, a baseline, a memory whose decay has signs, or a feed-forward layer that learns."""
    if name in PRESETS:
        return recurrent(name)
    if name == "in_place":
        return recurrent("gated_delta", feed_forward="in_place", feed_forward_grad_batch=8)
    if name == "signed":
        node = recipe("gated_delta") | {"decay": part("decay", "signed")}
    else:
        node = test_baselines.recipes()[name] | test_baselines.SMALL.get(name, {})
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "num_layers": 1}
    return LanguageModel(LanguageModelConfig(mixers={"m": node}, pattern=["m"], **sizes)).double().eval()


def step_of(m: LanguageModel, length: int = 40) -> steps.Step:
    """A step whose places are full of what must not be read."""
    step = steps.Step(m, IDS[:, :1], m(IDS[:, :length], use_cache=True).past_key_values)
    for x in step.buffers.flat.values():
        x.fill_(torch.nan if x.is_floating_point() else 7)
    return step


@pytest.mark.parametrize("name", marked(PRESETS) + list(OTHERS))
@torch.no_grad()
def test_pieces_are_the_prompt(name):
    """Whatever lay in the places before; the second time to the last bit."""
    m = built(name)
    step, whole = step_of(m), m(IDS[:, : sum(SIZES)], use_cache=True, logits_to_keep=1)
    if name in WITHOUT:
        assert "MemoryAsContext can't tell its state after no token" in step.pieces.refusal(m)
        return
    assert step.pieces.refusal(m) is None
    step.pieces.capture(m, IDS, list(SIZES))
    found, again = step.pieces(IDS, list(SIZES)), step.pieces(IDS, list(SIZES))
    assert torch.equal(found, again)
    torch.testing.assert_close(m.head(found), whole.logits, rtol=0, atol=1e-12)
    wanted = leaves(whole.past_key_values.states)
    torch.testing.assert_close(leaves(step.buffers.states), wanted, rtol=0, atol=1e-12)
    with Waits() as waits:
        step.pieces(IDS, list(SIZES))
    assert bool(waits.found) == (name in WAITS), waits.found


@pytest.mark.parametrize("preset", ["gated_delta", "titans", "kda"])
@torch.no_grad()
def test_pieces_have_the_casts_of_autocast(preset, monkeypatch):
    """To the last bit of the same pieces layer by layer."""
    m = recurrent(preset).float()
    with torch.autocast("cpu", torch.bfloat16):
        step = step_of(m)
        step.pieces.capture(m, IDS, [32])
        found = step.pieces(IDS, [32, 32])
        monkeypatch.setattr(m, "piece", lambda given: 32)
        plain = m(IDS[:, :64], use_cache=True, logits_to_keep=1)
        assert torch.equal(m.head(found), plain.logits)
        assert all(map(torch.equal, leaves(step.buffers.states), leaves(plain.past_key_values.states)))


def test_a_prompt_is_cut_into_pieces():
    for rows, length, wanted in (
        (1, 512, [512]),
        (1, 16384, 2 * [8192]),
        (1, 22000, 2 * [8192] + 2 * [2048] + 2 * [512]),
        (1, 511, []),
        (16, 1024, 2 * [512]),
        (64, 1024, 8 * [128]),
        (64, 1000, 7 * [128] + [64]),
        (3, 6000, 2 * [2688] + 4 * [128]),
        (100_000, 70, [64]),
    ):
        assert pieces.lengths(rows, length) == wanted
        like = SimpleNamespace(shape=(rows, length), is_cuda=True)
        assert all(rows * size <= max(PIECE, rows * recurrent("gated_delta").piece(like)) for size in wanted)


@pytest.fixture
def replays(monkeypatch) -> Iterator[list[int]]:
    """Steps are taken on a CPU too, and small pieces. Each piece adds the number of its tokens a row."""
    call, found = pieces._Piece.__call__, []

    def counted(self, ids):
        found.append(ids.shape[1])
        call(self, ids)

    def anywhere(ids: Tensor) -> str | None:
        return None if steps._ALLOWED.get() and not torch.is_grad_enabled() else "not here"

    monkeypatch.setattr(steps, "refusal_of_call", anywhere)
    monkeypatch.setattr(pieces._Piece, "__call__", counted)
    monkeypatch.setattr(pieces, "TOKENS", (64, 32))
    monkeypatch.setattr(pieces, "MULTIPLE", 8)
    monkeypatch.setattr(LanguageModel, "piece", lambda self, given: 24)
    yield found
    steps._STEPS.clear()
    steps._UNREAD.clear()


def generated(m: LanguageModel, rows: int = 2, length: int = 48, **settings: Any) -> Any:
    ids = IDS.repeat(-(-rows // 2), -(-length // IDS.shape[1]))[:rows, :length].to(m.device)
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    found = m.generate(ids, **given | settings, return_dict_in_generate=True, output_logits=True)
    return SimpleNamespace(sequences=found.sequences, logits=found.logits)  # no cache, which would stay in its places


def same(found: Any, wanted: Any) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", ["gated_delta", "titans", "kda"])
def test_generate_reads_a_second_prompt_by_pieces(preset, replays):
    """Of whatever length, with what is left layer by layer; after weights have changed in whatever way."""
    m = recurrent(preset)
    for rows in (2, 3, 1):
        size = 64 // rows // 8 * 8
        generated(m, rows)
        assert not replays
        for length in (48, 90, 64, 48):
            wanted = generated(m, rows, length, disable_compile=True)
            assert not replays
            same(generated(m, rows, length), wanted)
            assert replays == pieces.lengths(rows, length) and replays[0] == min(size, length // 32 * 32 or size)
            replays.clear()
    step, before = steps._STEPS[m], generated(m, 1)
    m.blocks[0].mixer.projection.weight.data.mul_(0.5)  # no version tells
    replays.clear()
    after = generated(m, 1)
    assert replays and steps._STEPS[m] is step and not torch.equal(after.logits[0], before.logits[0])
    same(after, generated(m, 1, disable_compile=True))
    m.embedding.weight = m.head.weight = torch.nn.Parameter(m.embedding.weight * 2)
    replays.clear()
    same(generated(m, 1), generated(m, 1, disable_compile=True))
    assert not replays and steps._STEPS[m] is not step
    same(generated(m, 1), generated(m, 1, disable_compile=True))
    assert replays
    m.train()
    assert m not in steps._STEPS


@torch.no_grad()
def test_why_no_pieces_are_captured(replays, monkeypatch):
    m, ids = recurrent("gated_delta"), IDS[:, :64]
    prompt = {"input_ids": ids, "use_cache": True, "logits_to_keep": 1}

    def refused(said: str, segments: Tensor | None = None, **other: Any) -> None:
        given = prompt | {"segments": segments} | other
        asked = given["inputs_embeds"] if given["input_ids"] is None else given["input_ids"]
        assert said in str(decoding.refusal_of_pieces(m, asked, segments))
        m(**given)
        assert not replays

    refused("no step is captured for 2 rows")
    generated(m)
    assert decoding.refusal_of_pieces(m, ids) is None
    refused("no step is captured for 1 rows", input_ids=ids[:1])
    refused("documents", segments=torch.arange(64).expand(2, -1) // 40)
    refused("vectors", input_ids=None, inputs_embeds=m.embedding(ids))
    refused("its last 10 tokens go layer by layer", input_ids=ids[:, :10])
    refused("its last 4 tokens go layer by layer", input_ids=ids[:, :20])
    with decoding.uncaptured():
        refused("not here")
    with m.blocks[0].register_forward_hook(lambda *_: None):
        refused("hooks")
    monkeypatch.setattr(m.blocks[0], "_compiled_call_impl", m.blocks[0].forward)
    refused("compiled")
    monkeypatch.setattr(m.blocks[0], "_compiled_call_impl", None)
    cache = m(**prompt).past_key_values
    assert isinstance(cache, Held) and replays
    replays.clear()
    refused("states of another text lie there")
    del cache
    m(**prompt | {"use_cache": False})
    assert not replays
    steps._STEPS.clear()
    generated(m, attention_mask=torch.arange(48).expand(2, -1) >= torch.tensor([[7], [0]]))
    refused("documents were told")


@pytest.mark.parametrize("kind", [steps.HostNeededError, torch.OutOfMemoryError])
def test_pieces_that_can_not_be_captured_are_told_once(kind, replays, monkeypatch):
    """For any number of rows, until the model is trained."""
    m = recurrent("gated_delta")
    wanted = [generated(m, rows, disable_compile=True) for rows in (2, 1)]
    with monkeypatch.context() as patch:

        def refuses(*_):
            raise kind("why not")

        patch.setattr(pieces._Piece, "layers", refuses)
        patch.setattr(pieces.Pieces, "_graph", lambda self, run, like: run() or run)
        with pytest.warns(UserWarning, match="prompts go layer by layer: why not") as told:
            for i in (0, 0, 1, 1, 0, 0):
                same(generated(m, 2 - i), wanted[i])
        assert len(told) == 1 and not replays
    with torch.no_grad():
        assert decoding.refusal_of_pieces(m, IDS) == "why not"
        m.train().eval()
        for _ in range(2):
            same(generated(m), wanted[0])
        assert replays


@torch.no_grad()
def test_pieces_of_inference_mode_are_those_of_no_grad(replays):
    m, ids = recurrent("gated_delta"), IDS[:, :64]
    wanted = m(ids, use_cache=True, logits_to_keep=1).logits
    with torch.inference_mode():
        generated(m)
        found = [m(ids.clone(), use_cache=True, logits_to_keep=1).logits]
    found.append(m(ids, use_cache=True, logits_to_keep=1).logits)
    assert replays == 4 * [32]
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_prompt_beside_another_threads_goes_layer_by_layer(replays, monkeypatch):
    """Rather than through the places that the other's states lie in. What is forgotten meanwhile is read to its end."""
    m = recurrent("gated_delta")
    generated(m)
    with decoding.uncaptured():
        wanted = [m(ids, use_cache=True, logits_to_keep=1).logits for ids in (IDS[:, :64], IDS[:, 20:84])]
    read, found = steps.Step.read, []
    other = torch.no_grad()(lambda: found.append(m(IDS[:, 20:84], use_cache=True, logits_to_keep=1).logits))

    def slowly(*given):
        monkeypatch.setattr(steps.Step, "read", read)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        decoding.forget(m)
        return read(*given)

    monkeypatch.setattr(steps.Step, "read", slowly)
    replays.clear()
    found.append(m(IDS[:, :64], use_cache=True, logits_to_keep=1).logits)
    assert replays == [32, 32]
    torch.testing.assert_close(found, wanted[::-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ends", [1, 2])
def test_what_a_failed_run_has_begun_ends_before_what_comes_next(ends, monkeypatch):
    """It would write over the states of the prompt that then goes layer by layer."""
    done: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: done.append("waited"))
    for name, fake in (
        ("current_stream", lambda: stream),
        ("Stream", lambda: SimpleNamespace(wait_stream=lambda other: None)),
        ("stream", lambda other: nullcontext()),
        ("get_sync_debug_mode", lambda: 0),
        ("set_sync_debug_mode", lambda mode: done.append(str(mode))),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)

    def run() -> None:
        done.append("run")
        if done.count("run") == ends:
            raise torch.OutOfMemoryError("too large") if ends == 1 else RuntimeError("a synchronizing operation")

    said = "too large" if ends == 1 else "a layer waits for the host .a synchronizing operation"
    with pytest.raises(torch.OutOfMemoryError if ends == 1 else graph.HostNeededError, match=said):
        graph.captured(run, "a layer")
    assert done == (["run", "waited"] if ends == 1 else ["run", "error", "run", "0", "waited"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["gated_delta", "titans", "kda"])
@torch.no_grad()
def test_captured_pieces_are_the_prompt(preset, dtype):
    """Within rounding, and to the last bit each time; with the token after it, and after weights have changed."""
    m = model(preset, hidden_size=256).float().cuda().eval()
    draw = torch.Generator().manual_seed(2)
    with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
        for rows, length in ((1, 6144), (16, 1344), (64, 700)):
            ids = torch.randint(V, (rows, length + 1), generator=draw).cuda()
            sizes = pieces.lengths(rows, length)
            assert sum(sizes) in (length, length - 60)
            for _ in range(2):
                with decoding.uncaptured():
                    wanted = read(m, ids)
                first, second = read(m, ids), read(m, ids)  # the first time there is no step yet
                assert set(steps._STEPS[m].pieces.pieces) == set(sizes)
                third = read(m, ids)
                for a, b, c in zip(second, third, wanted, strict=True):
                    assert a.equal(b), (a - b).abs().max()
                    assert (b - c).norm() <= (0.03 if dtype == torch.bfloat16 else 1e-3) * c.norm()
                for a, c in zip(first, wanted, strict=True):
                    assert (a - c).norm() <= (0.03 if dtype == torch.bfloat16 else 1e-3) * c.norm()
                m.blocks[1].mixer.projection.weight.data.mul_(0.9)
    decoding.forget(m)


def read(m: LanguageModel, ids: Tensor) -> list[Tensor]:
    """The logits after all but the last token and after that, and the states then."""
    prompt = m(ids[:, :-1], use_cache=True, logits_to_keep=1)
    out = m(ids[:, -1:], past_key_values=prompt.past_key_values, use_cache=True)
    return [x.float() for x in (prompt.logits, out.logits, *leaves(out.past_key_values.states))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_piece_that_waits_for_the_host_is_told(monkeypatch):
    m, forward = recurrent("gated_delta").float().cuda(), Mixer.forward

    def waits(self, x, *others):
        assert x.shape[1] == 1 or x.sum().isfinite()
        return forward(self, x, *others)

    wanted = generated(m, 1, 1024)
    monkeypatch.setattr(Mixer, "forward", waits)
    with pytest.warns(UserWarning, match="prompts go layer by layer: a layer waits for the host") as told:
        found = [generated(m, 1, 1024) for _ in range(3)]
    assert len(told) == 1 and steps._STEPS[m].pieces.pieces == {}
    for each in found:
        torch.testing.assert_close(each.logits[0], wanted.logits[0], rtol=0, atol=1e-3)
    decoding.forget(m)
