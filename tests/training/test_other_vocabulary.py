"""init_from= with another tokenizer, and by a name on the hub.

What people met elsewhere: https://github.com/microsoft/MASS/issues/30 (sizes differ, and nothing says what to do),
https://github.com/google-research/bert/issues/406 (the same size, other tokens: trained on without a word),
https://github.com/facebookresearch/ParlAI/issues/4543 (another tokenizer over the old weights).
"""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config

from data.tokenizer import Bpe, Bytes, HuggingFace
from data.vocabulary import meanings, shared
from models.language_model import LanguageModel
from models.training import weights
from scripts import evaluate
from tests.test_language_model import model

TEXT = "to be, or not to be: 文 é"


def bpe(text: str, size: int) -> Bpe:
    made = Bpe(size)
    made.train([text])
    return made


def sentences(folder) -> HuggingFace:
    """A tokenizer that writes blanks as U+2581 and bytes as <0x..>, as Llama's does."""
    words = ["<unk>", "</s>", "<0x0A>", "\u2581to", "\u2581be", "t", "文", "\u2581"]
    rust = RustTokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    rust.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("</s>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return HuggingFace(str(folder))


def test_tokens_mean_the_same_however_they_are_written(tmp_path):
    learnt, spm = bpe(TEXT * 9, 290), sentences(tmp_path)
    assert shared(Bytes(), Bytes()) == {i: i for i in range(257)}
    found = meanings(spm)
    assert [found[i] for i in range(8)] == ["<unk>", "end", b"\n", b" to", b" be", b"t", "文".encode(), b" "]
    ours = meanings(learnt)
    assert {ours[i] for i in learnt.encode(" to be")} == {b" to", b" be"}
    same = {ours[id]: found[other] for id, other in shared(spm, learnt).items()}
    assert same == {x: x for x in ("end", b"\n", b" to", b" be", b"t", "文".encode(), b" ") if x in ours.values()}
    assert b" to" in same and "end" in same
    assert shared(Bytes(), learnt)[learnt.eos] == Bytes.eos and len(shared(Bytes(), learnt)) == 257


def exported(folder, tokenizer, **settings) -> LanguageModel:
    torch.manual_seed(1)
    made = model("softmax", vocab_size=tokenizer.vocab_size, **settings).float()
    made.save_pretrained(folder)
    tokenizer.save(folder)
    return made


@pytest.mark.parametrize("tied", [True, False])
def test_the_body_is_taken_over_and_the_rows_of_tokens_that_are_shared(tied, tmp_path):
    """Of text in these tokens alone it is the same function: bytes to BPE, of another size. And back."""
    learnt = bpe(TEXT * 9, 290)
    for theirs_of, ours_of in ((Bytes(), learnt), (learnt, Bytes())):
        theirs = exported(tmp_path / theirs_of.spec(), theirs_of, tie_embeddings=tied).eval()
        torch.manual_seed(2)
        ours = model("softmax", vocab_size=ours_of.vocab_size, tie_embeddings=tied).float().eval()
        before = ours.head.weight.clone()
        said = weights.load(ours, str(tmp_path / theirs_of.spec()), ours_of)
        same = shared(theirs_of, ours_of)
        anew = ours_of.vocab_size - len(same)
        assert f"\nembedding 257 rows are those of tokens with the same text, and {anew} begin anew" in said
        mine, other = list(same), list(same.values())
        ids = torch.randint(257, (2, 20))
        with torch.no_grad():
            a = theirs(torch.tensor(other)[ids]).logits[..., other]
            b = ours(torch.tensor(mine)[ids]).logits[..., mine]
        torch.testing.assert_close(a, b)
        rest = [i for i in range(ours_of.vocab_size) if i not in same]
        assert torch.equal(ours.head.weight[rest], before[rest])


def test_what_makes_no_sense_is_refused(tmp_path):
    spm = sentences(tmp_path / "spm")
    exported(tmp_path / "theirs", spm)
    alone = bpe("ab", 257)
    kept = {0: b"ab", alone.eos: "end"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.vocabulary.meanings", lambda t: kept if t is alone else meanings(t))
        with pytest.raises(
            ValueError, match=r"no text in common.* take its own by tokenizer=hugging_face tokenizer\.name="
        ):
            weights.load(model("softmax", vocab_size=257).float(), str(tmp_path / "theirs"), alone)
    with pytest.raises(ValueError, match=r"another model: embedding\.weight is 8 x \d+ there and 257 x \d+ here"):
        weights.load(model("softmax", vocab_size=257).float(), str(tmp_path / "theirs"))  # a task that is not text
    with pytest.raises(ValueError, match=r"another model: embedding\.weight is 8 x 32 there and 257 x 64 here"):
        weights.load(model("softmax", vocab_size=257, hidden_size=64).float(), str(tmp_path / "theirs"), Bytes())


def in_the_cache(cache, name: str, config_of) -> None:
    """A model as huggingface_hub keeps it."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    config_of(home / "snapshots" / ("0" * 40))


def test_a_name_on_the_hub_is_taken_from_its_cache(tmp_path, monkeypatch):
    """Others found nothing there without a network, or said so in a traceback:
    https://github.com/huggingface/huggingface_hub/issues/4487, https://github.com/ostris/ai-toolkit/issues/905."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    in_the_cache(tmp_path, "me/small", lambda folder: exported(folder, Bytes()))
    in_the_cache(tmp_path, "qwen/small", Qwen3Config().save_pretrained)
    ours = model("softmax", vocab_size=257).float()
    assert "models--me--small" in weights.load(ours, "me/small", Bytes())
    assert weights.open_trained("me/small").tokenizer().vocab_size == 257
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    assert evaluate.home(weights.open_trained("me/small"), "me/small") == tmp_path / "runs" / "me--small"
    with pytest.raises(
        ValueError, match=r"^init_from=qwen/small is a model of model_type='qwen3'.*import_model\.py NAME"
    ):
        weights.find("qwen/small")
    with pytest.raises(ValueError, match=r"^init_from=me/none is no folder here, and as a name on the hub it can't be"):
        weights.find("me/none")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^init_from=runs/none does not exist"):
        weights.find("runs/none")
