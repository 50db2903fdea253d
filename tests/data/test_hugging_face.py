"""Published tokenizers: their map from text to ids is taken from their file, and nothing else that stands there. Beside
a test is where people met its case."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from data.byte_level import byte_characters
from data.tokenizer import Bpe, Bytes, HuggingFace
from tests.test_calls import model

TEXTS = ["a" * 1000, "ab 12\n\nc", "é文🙂", ""]
BOS, END = ("<s>", 258), ("</s>", 256)


def published(folder: Path, change: Callable[[Tokenizer], object] = lambda t: None, **settings) -> Path:
    """A folder with the bytes, </s> 256, <pad> 257 and <s> 258, as somebody else has saved it."""
    ids = {token: i for i, token in enumerate([*byte_characters(), "</s>", "<pad>", "<s>"])}
    t = Tokenizer(models.BPE(vocab=ids, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return save(t, folder, change, **settings)


def save(t: Tokenizer, folder: Path, change: Callable[[Tokenizer], object] = lambda t: None, **settings) -> Path:
    change(t)
    folder.mkdir()
    t.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def exported(tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def template(t: Tokenizer) -> None:
    t.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[BOS, END])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.enable_truncation(64),
        lambda t: t.enable_padding(pad_id=257, pad_token="<pad>"),
        template,
        lambda t: setattr(t, "post_processor", processors.RobertaProcessing(END, BOS)),
    ],
    ids=["truncation", "padding", "template", "roberta"],
)
def test_a_file_that_does_more_than_the_map(change, tmp_path):
    """It cuts, pads or puts tokens around a text: huggingface/transformers issues 24179 and 22794, daulet/tokenizers
    issue 30, elixir-nx/tokenizers pull request 46, huggingface/datatrove issue 345. The exported one cuts at no length
    (transformers issue 1791), and is not changed by what a caller asks for (issue 18406)."""
    tokenizer = HuggingFace(published(tmp_path / "theirs", change, bos_token="<s>", model_max_length=16))
    expected = [list(text.encode()) for text in TEXTS]
    for each in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert [ids.tolist() for ids in each.encode_batch(TEXTS)] == expected
    again = exported(tokenizer, tmp_path / "ours")
    assert again(TEXTS).input_ids == expected
    assert again(TEXTS[0], truncation=True).input_ids == expected[0]
    tokenizer.to_hugging_face()(TEXTS[0], truncation=True, max_length=5)
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == expected


def test_ids_with_holes(tmp_path):
    """huggingface/tokenizers issue 900: the size of the embedding is the largest id + 1; and generate's stop strings
    meet ids that are no token (transformers issue 35244)."""

    def hole(t: Tokenizer) -> None:
        parts = json.loads(t.to_str())
        parts["model"]["vocab"]["far"] = 300
        t.model = Tokenizer.from_str(json.dumps(parts)).model

    tokenizer = HuggingFace(published(tmp_path / "theirs", hole))
    assert tokenizer.vocab_size == 301
    assert tokenizer.decode([97, 290, 98]) == "ab"
    again, m = exported(tokenizer, tmp_path / "ours"), model("linear", vocab_size=301, **tokenizer.special_ids)
    ids = again(["abc"], return_tensors="pt")
    m.eval().generate(**ids, max_new_tokens=3, do_sample=False, stop_strings=["xyz"], tokenizer=again)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "GemmaTokenizer", "CodeLlamaTokenizer"])
def test_the_map_is_that_of_the_file_whatever_its_class_is_called(name, tmp_path):
    """AutoTokenizer builds some classes anew and lost all blanks (huggingface/transformers issues 45488, 45920 and
    48206); "2023" is split into digits by the file alone."""

    def digits(t: Tokenizer) -> None:
        steps = [pre_tokenizers.Digits(individual_digits=True), t.pre_tokenizer]
        t.pre_tokenizer = pre_tokenizers.Sequence(steps)
        t.model = models.BPE(vocab=json.loads(t.to_str())["model"]["vocab"] | {"20": 259}, merges=[("2", "0")])

    tokenizer = HuggingFace(published(tmp_path / "theirs", digits, tokenizer_class=name, unk_token="</s>"))
    assert tokenizer.encode("in 2023") == list(b"in 2023") and tokenizer.decode(tokenizer.encode("a b")) == "a b"
    assert exported(tokenizer, tmp_path / "ours")("in 2023").input_ids == list(b"in 2023")


def test_text_that_spells_the_end_is_not_the_end(tmp_path):
    """huggingface/tokenizers issue 1850, transformers pull request 25081: whether the end is a special token, a plain
    added one, or a word of the vocabulary."""
    text = "a</s>b"
    for i, change in enumerate((lambda t: None, lambda t: t.add_tokens([AddedToken("</s>", special=False)]))):
        assert HuggingFace(published(tmp_path / str(i), change)).encode(text) == list(text.encode())
    pieces = ["<unk>", "</s>", "▁", "a", "b", "<", "/", "s", ">"]
    unigram = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = HuggingFace(save(unigram, tmp_path / "unigram", unk_token="<unk>"))
    assert tokenizer.eos not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    words = Tokenizer(models.WordLevel({"a": 0, "E": 1}, unk_token="a"))
    with pytest.raises(ValueError, match=r"makes its end-of-sequence token of a text with 'E' in it"):
        HuggingFace(save(words, tmp_path / "words", eos_token="E"))


def test_the_end_is_not_taken_where_its_letters_are_unknown(tmp_path):
    """An unknown letter costs more than the worst piece, and so more than the end."""
    pieces = ["<unk>", "</s>", "▁", *"srikethou"]
    unigram = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = HuggingFace(save(unigram, tmp_path / "theirs", unk_token="<unk>"))
    ids = tokenizer.encode("strike <s>this</s> out")
    assert tokenizer.eos not in ids and 0 in ids and tokenizer.decode(tokenizer.encode("this is")) == "this is"
    again = exported(tokenizer, tmp_path / "ours")
    assert again("strike <s>this", add_special_tokens=False).input_ids == tokenizer.encode("strike <s>this")
    assert HuggingFace(str(tmp_path / "ours")).encode("strike <s>this</s> out") == ids


def test_unknown_characters_are_not_the_end_of_a_document(tmp_path):
    bpe = models.BPE(vocab={"</s>": 0, "a": 1}, merges=[], unk_token="</s>")
    unigram = models.Unigram([("</s>", 0.0), ("a", -1.0)], unk_id=0)
    for i, each in enumerate((bpe, unigram)):
        with pytest.raises(
            ValueError, match=r"has its end-of-sequence token '</s>' for unknown characters too; choose"
        ):
            HuggingFace(save(Tokenizer(each), tmp_path / str(i)))


def test_dropout_is_for_training(tmp_path):
    """Of merges: with it a text is encoded otherwise each time."""

    def dropout(t: Tokenizer) -> None:
        vocabulary = json.loads(t.to_str())["model"]["vocab"] | {"ab": 259}
        t.model = models.BPE(vocab=vocabulary, merges=[("a", "b")], dropout=0.5)

    tokenizer = HuggingFace(published(tmp_path / "theirs", dropout))
    assert tokenizer.encode("ab" * 50) == [259] * 50
    assert exported(tokenizer, tmp_path / "ours")("ab" * 50).input_ids == [259] * 50


def test_settings_that_are_no_dictionary_are_one_sentence(tmp_path):
    folder = published(tmp_path / "theirs")
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"^tokenizer\.name='.*theirs' can't be loaded: it must be a folder with"):
        HuggingFace(str(folder))


@pytest.mark.parametrize(
    "settings, pad",
    [
        ({"pad_token": "<pad>"}, 257),
        ({"pad_token": "</s>", "bos_token": "<s>"}, 258),
        ({"bos_token": "<s>"}, 258),
        ({"bos_token": "</s>"}, 256),
    ],
)
def test_padding_is_another_token_than_the_end_where_there_is_one(settings, pad, tmp_path):
    """A collator leaves padding out of the loss, and eos with it where they are one, so that the model never learns to
    stop: huggingface/trl issue 976, huggingface/blog issue 1302, transformers issue 48016."""
    tokenizer = HuggingFace(published(tmp_path / "theirs", **settings))
    again = exported(tokenizer, tmp_path / "ours")
    assert tokenizer.special_ids == {"eos_token_id": 256, "pad_token_id": pad}
    assert (again.eos_token_id, again.pad_token_id, again.padding_side) == (256, pad, "left")
    if pad != 256:
        labels = DataCollatorForLanguageModeling(again, mlm=False)([{"input_ids": [97, 256]}, {"input_ids": [97]}])
        assert labels["labels"].tolist() == [[97, 256], [-100, 97]]


def test_padding_of_our_own_tokenizers_is_a_byte_that_no_text_has(tmp_path):
    bpe = Bpe(280)
    bpe.train(["the cat sat on the mat, ÿ and þ"] * 3)
    for name, tokenizer in (("bytes", Bytes()), ("bpe", bpe)):
        again = exported(tokenizer, tmp_path / name)
        for text in ("ÿ", "þ", "\x00", "the cat"):
            assert again(text).input_ids == tokenizer.encode(text) and tokenizer.pad not in tokenizer.encode(text)
            assert again.decode(again(text).input_ids) == text
        assert tokenizer.pad not in tokenizer.encode("it spells <pad>")
        assert (again.pad_token_id, again.padding_side) == (tokenizer.pad, "left") and tokenizer.pad != tokenizer.eos
        assert len(again) == tokenizer.vocab_size
    loaded = Bpe(280)
    loaded.load(tmp_path / "bpe")
    assert loaded.fingerprint() == bpe.fingerprint() and loaded.pad == bpe.pad
    assert loaded.encode("ÿ the cat") == bpe.encode("ÿ the cat")


def test_what_a_normalizer_loses_is_said(tmp_path, documents):
    """Bits per byte count the bytes of the text as it was: google/sentencepiece issue 329, huggingface/tokenizers issue
    563. Blanks before a full stop stay (tokenizers issue 1543)."""
    from data.text import Text

    steps = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    lossy = HuggingFace(published(tmp_path / "lossy", lambda t: setattr(t, "normalizer", steps)))
    assert lossy.loses == ("capitals", "forms that NFKC unites")
    task = Text(documents(["some text"], ["held out"]), lossy, seq_len=4)
    task.prepare()
    assert "warning: the tokenizer does not keep capitals, forms that NFKC unites" in task.describe()[-1]
    plain = HuggingFace(published(tmp_path / "plain", clean_up_tokenization_spaces=True))
    assert plain.loses == () and plain.decode(plain.encode("hello !")) == "hello !"
    strips = HuggingFace(published(tmp_path / "strips", lambda t: setattr(t, "normalizer", normalizers.Strip())))
    assert strips.loses == ("blanks at the end",)
    blank = pre_tokenizers.ByteLevel(add_prefix_space=True)  # one before each text, which loses nothing
    assert HuggingFace(published(tmp_path / "blank", lambda t: setattr(t, "pre_tokenizer", blank))).loses == ()


def test_bytes_that_a_vocabulary_falls_back_to(tmp_path):
    """huggingface/tokenizers pull request 1183 and issue 517: what is no word is its bytes, or is said to be lost."""
    pieces = {"<unk>": 0, "</s>": 1, "a": 2, "▁": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    for fallback in (True, False):
        t = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=fallback))
        t.normalizer = normalizers.Replace(" ", "▁")
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer = HuggingFace(save(t, tmp_path / str(fallback), unk_token="<unk>"))
        assert tokenizer.loses == (() if fallback else ("capitals", *tokenizer.loses[1:]))
        assert (tokenizer.decode(tokenizer.encode("a 文\n")) == "a 文\n") == fallback


def test_the_model_of_a_run_stops_and_pads():
    """generate reads eos from the model's config: huggingface/open-r1 pull request 663, hiyouga/LlamaFactory issue
    9338, salesforce/CodeGen issue 32."""
    m = model("gated_delta", vocab_size=257, **Bytes().special_ids).eval()
    tokenizer = Bytes().to_hugging_face()
    config = m.generation_config
    assert (config.eos_token_id, config.pad_token_id) == (m.config.eos_token_id, m.config.pad_token_id) == (256, 255)

    def certain(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The first row's text ends."""
        return scores.index_put((torch.tensor([0]), torch.tensor([256])), torch.tensor(1e9, dtype=scores.dtype))

    batch = tokenizer(["import os\n", "def"], return_tensors="pt", padding=True)
    found = m.generate(**batch, max_new_tokens=9, do_sample=False, logits_processor=[certain])[:, 10:]
    assert found[0].tolist() == [256] + [255] * (found.shape[1] - 1)
    alone = m.generate(**tokenizer("def", return_tensors="pt"), max_new_tokens=9, do_sample=False)[:, 3:]
    assert torch.equal(found[1:, : alone.shape[1]], alone)
