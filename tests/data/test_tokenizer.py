"""Every text comes back from its ids, and an exported tokenizer is the same map."""

import pytest

from data.tokenizer import EOS, Bpe, Bytes, HuggingFace

TEXTS = [
    "plain ascii",
    "  leading,   inner and trailing blanks \n\n\t",
    "naïve café, Größe, Ελληνικά, 世界, 🙂👩‍👩‍👧, \u200b and \x00",
    "",
]
CORPUS = ["the cat sat on the mat, the dog on the log", "Größe 世界 the end"] * 3


@pytest.fixture(scope="module")
def bpe():
    tokenizer = Bpe(vocab_size=280)
    tokenizer.train(CORPUS)
    return tokenizer


@pytest.fixture
def tokenizer(request, bpe, tmp_path):
    if request.param == "hugging_face":
        bpe.save(tmp_path / "saved")
        return HuggingFace(str(tmp_path / "saved"))
    return bpe if request.param == "bpe" else Bytes()


every = pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "hugging_face"], indirect=True)


@every
def test_round_trip(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]


@every
def test_the_end_of_document_is_never_in_a_text_and_decodes_to_nothing(tokenizer):
    assert tokenizer.eos not in tokenizer.encode(f"it spells {EOS}, no more")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos, *tokenizer.encode("b")]) == "ab"


@every
def test_what_is_not_utf8_is_replaced(tokenizer):
    half = tokenizer.encode("文")[:-1]  # not in the corpus, so not one token
    assert set(tokenizer.decode(half)) == {"\ufffd"}
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"  # a lone surrogate, as JSON may hold


@every
def test_the_exported_tokenizer_is_the_same_map(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "export")
    exported = AutoTokenizer.from_pretrained(str(tmp_path / "export"))
    assert (len(exported), exported.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos)
    for text in TEXTS:
        ids = exported(text).input_ids
        assert ids == tokenizer.encode(text)
        assert exported.decode(ids) == text


def test_bytes_are_the_bytes():
    assert Bytes().encode("é") == [0xC3, 0xA9]
    assert (Bytes().vocab_size, Bytes().eos) == (257, 256)


def test_bpe_training_is_deterministic_and_saved(bpe, tmp_path):
    again = Bpe(vocab_size=280)
    again.train(CORPUS)
    assert again.fingerprint() == bpe.fingerprint()
    assert bpe.vocab_size == 280 and bpe.eos == 279
    assert len(bpe.encode("the cat sat")) < len("the cat sat")
    bpe.save(tmp_path)
    loaded = Bpe(vocab_size=280)
    loaded.load(tmp_path)
    assert loaded.fingerprint() == bpe.fingerprint()


def test_bpe_learns_from_the_first_bytes_only(bpe):
    short, long = Bpe(300, train_bytes=10), Bpe(300, train_bytes=10)
    short.train(["the cat the cat"])
    long.train(["the cat the cat", "never reached " * 10])
    assert short.fingerprint() == long.fingerprint() != bpe.fingerprint()
    assert short.vocab_size < 300  # as many as there were pairs to merge


def test_errors_name_the_setting(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=256 is too small"):
        Bpe(256)
    with pytest.raises(ValueError, match=r"tokenizer=bpe has not been trained yet"):
        Bpe(300).encode("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer.name='.*empty' can't be loaded"):
        HuggingFace(str(tmp_path / "empty"))
