"""Generation and its caches: what transformers' generate is asked for is done as whole passes have it, or refused.
Beside a test is where people met its case."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, TextIteratorStreamer

from data.tokenizer import Bytes
from models.language_model import LanguageModel
from tests.test_calls import IDS, every_mixer, model


def generated(m: LanguageModel, ids: torch.Tensor, **settings) -> torch.Tensor:
    return m.eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **settings)[:, ids.shape[1] :]


@every_mixer
def test_generate_goes_on_from_a_prefix_of_any_length(preset):
    """A prompt that many requests share, or a chat's next turn (huggingface/transformers issues 24841 and 36151)."""
    m = model(preset)
    expected = generated(m, IDS)
    for length in (1, 12, 19):
        cache = m(IDS[:, :length], use_cache=True).past_key_values
        assert cache.get_seq_length() == length
        assert m.prepare_inputs_for_generation(IDS, cache)["input_ids"].shape == (2, 20 - length)
        assert torch.equal(generated(m, IDS, past_key_values=cache), expected)
    with pytest.raises(ValueError, match="the cache has seen 20 tokens, and input_ids has 20"):
        generated(m, IDS, past_key_values=m(IDS, use_cache=True).past_key_values)


@every_mixer
def test_a_cache_goes_on_in_its_own_document(preset):
    m = model(preset)
    documents = {"position_ids": torch.arange(12).remainder(7).unsqueeze(0)}
    cache = m(IDS[:, :12], use_cache=True, **documents).past_key_values
    expected = m(IDS[:, 7:]).logits[:, 5:]
    torch.testing.assert_close(m(IDS[:, 12:], past_key_values=cache).logits, expected)
    positions = torch.tensor([[5, 6, 7, 8, 0, 1, 2, 3]])
    anew = m(IDS[:, 12:], past_key_values=cache, position_ids=torch.arange(8).unsqueeze(0)).logits
    torch.testing.assert_close(anew, m(IDS[:, 12:]).logits)
    apart = torch.cat([expected[:, :4], m(IDS[:, 16:]).logits], dim=1)
    torch.testing.assert_close(m(IDS[:, 12:], past_key_values=cache, position_ids=positions).logits, apart)


def test_a_mask_after_a_cache_says_whether_its_text_goes_on():
    m = model()
    cache, mask = m(IDS[:, :12], use_cache=True).past_key_values, F.pad(torch.ones(2, 6), (2, 0))
    with pytest.raises(ValueError, match=r"\(2, 8\) and begins with padding after a cache of 12 .* must be \[2, 20\]"):
        m(IDS[:, 12:], past_key_values=cache, attention_mask=mask)
    found = m(IDS[:, 12:], past_key_values=cache, attention_mask=F.pad(mask, (12, 0))).logits[:, 2:]
    torch.testing.assert_close(found, m(IDS[:, 14:]).logits)


@every_mixer
def test_a_cache_is_copied_and_repeated(preset):
    """As the caches of transformers, for a prompt that many requests share: with gradients, which torch's own copies
    refuse (huggingface/huggingface-llama-recipes issue 33, transformers pull request 32929), and for several rows
    (transformers issue 34232)."""
    m = model(preset, num_layers=1)
    cache = m(IDS[:1, :12], use_cache=True).past_key_values
    copied = deepcopy(cache)
    expected = m(IDS[:1, 12:], past_key_values=cache).logits
    found = m(IDS[:1, 12:], past_key_values=copied).logits
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(logits.sum(), m.embedding.weight, retain_graph=True)[0] for logits in (expected, found)
    ]
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match=r"past_key_values is of 1 rows, and the batch has 2; batch_repeat_interleave"):
        m(IDS[:, 12:], past_key_values=cache)
    copied.batch_repeat_interleave(2)
    beams = {"num_beams": 2, "num_return_sequences": 2}
    assert torch.equal(generated(m, IDS[:1], past_key_values=copied, **beams), generated(m, IDS[:1], **beams))
    assert cache.batch_size == 1


@every_mixer
def test_generate_has_what_it_is_asked_for(preset):
    """Rows of several lengths, beams and samples of each, what a streamer is told, where a string stops, logits and
    hidden states, and a prompt that is subtracted: as whole passes have it."""
    m, tokenizer = model(preset, vocab_size=257, num_layers=1, **Bytes().special_ids).eval(), Bytes().to_hugging_face()
    texts = ["def f(x):", "a longer prompt"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    several = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 5}
    found = m.generate(**batch, **several)[:, batch.input_ids.shape[1] :].split(2)
    for prompt, rows in zip(prompts, found, strict=True):
        alone = m.generate(prompt, **several)[:, prompt.shape[1] :]
        assert torch.equal(rows[:, : alone.shape[1]], alone)
    samples = []
    for cached in (True, False):
        torch.manual_seed(1)
        drawn = {"do_sample": True, "top_k": 20, "num_return_sequences": 3, "max_new_tokens": 5}
        samples.append(m.generate(**batch, use_cache=cached, **drawn))
    assert torch.equal(*samples)

    greedy, streamer = {"do_sample": False, "max_new_tokens": 5}, TextIteratorStreamer(tokenizer, skip_prompt=True)
    told = {"output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True}
    out = m.generate(prompts[0], streamer=streamer, **greedy, **told)
    whole, start = m(out.sequences, output_hidden_states=True), prompts[0].shape[1]
    assert "".join(streamer) == tokenizer.decode(out.sequences[0, start:])
    torch.testing.assert_close(torch.stack(out.logits, 1), whole.logits[:, start - 1 : -1].float())
    last = torch.cat([each[-1][:, -1:] for each in out.hidden_states], 1)
    torch.testing.assert_close(last, whole.hidden_states[-1][:, start - 1 : -1])
    with pytest.raises(TypeError, match="has no matrix of attention"):
        m.generate(prompts[0], output_attentions=True, return_dict_in_generate=True, **greedy)
    told_once = m.generate(prompts[0], stop_strings=["\x00"], tokenizer=tokenizer, logits_processor=[_nul], **greedy)
    assert told_once[0, start:].tolist() == [0]

    guided = m.generate(prompts[0], guidance_scale=1.5, negative_prompt_ids=prompts[1], **greedy)
    ids, others = prompts[0], prompts[1]
    for _ in range(5):
        with_, without = (m(x).logits[:, -1].log_softmax(-1) for x in (ids, others))
        token = (1.5 * (with_ - without) + without).argmax(-1, keepdim=True)
        ids, others = torch.cat([ids, token], 1), torch.cat([others, token], 1)
    assert torch.equal(guided, ids)


def _nul(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The next byte is 0."""
    return scores.index_fill(1, torch.tensor([0]), 1e9)


def test_what_generate_can_not_do_is_refused():
    """Tokens taken back (huggingface/transformers pull request 45745), and right padding, which spoils a state silently
    elsewhere (issue 48256)."""
    m = model()
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens: .* must be taken back"):
        generated(m, IDS[:1], prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens: .* must be taken back"):
        generated(m, IDS[:1], generation_config=GenerationConfig(prompt_lookup_num_tokens=3))
    for told, says in (
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: "),
        ({"assistant_early_exit": 1}, "assistant_early_exit: "),
        ({"cache_implementation": "static"}, "cache_implementation='static': "),
        *(({"prefill_chunk_size": size}, f"prefill_chunk_size={size!r}: ") for size in (4, 0, -1, 1.5, "a")),
    ):
        with pytest.raises(ValueError, match=says):
            m.generate(IDS[:1], GenerationConfig(max_new_tokens=5, **told))
    with pytest.raises(ValueError, match="inputs_embeds: generate goes on with input_ids"):
        m.generate(inputs_embeds=m.embedding(IDS[:1]), max_new_tokens=2)
    with pytest.raises(ValueError, match="a text goes on from one token at least"):
        generated(m, IDS[:1, :0])
    m.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: "):
        m.generate(IDS[:1], GenerationConfig(max_new_tokens=5))
    m.generation_config.prompt_lookup_num_tokens = None
    with pytest.raises(ValueError, match=r"assistant_model: .* must be taken back"):
        generated(m, IDS[:1], assistant_model=model())
    for kind in ("static", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation='{kind}': the cache is the states of the mixers"):
            generated(m, IDS, cache_implementation=kind)
    for name in ("segments", "seq_idx", "position_ids"):
        with pytest.raises(ValueError, match=f"{name}: generate goes on with one document"):
            generated(m, IDS, **{name: torch.zeros_like(IDS)})
    for given in ({}, {"past_key_values": m(IDS[:, :5], use_cache=True).past_key_values}):
        with pytest.raises(ValueError, match="pad on the left to generate"):
            m.generate(IDS, attention_mask=F.pad(torch.ones(2, 15), (0, 5)), max_new_tokens=1, **given)
