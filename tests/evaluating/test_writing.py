"""generate.py writes what the model's generate does, shows it as it comes, and holds no more than the states. Beside a
test is where people met its case."""

from __future__ import annotations

import io
import json
import shutil
from itertools import islice

import pytest
import torch

from data.tokenizer import Bytes
from models.language_model import LanguageModel
from models.training.weights import open_trained
from scripts import generate
from scripts.evaluating import writing
from scripts.evaluating.writing import Writer, greedy, sampled, shown
from tests.test_calls import IDS, every_mixer, model


def generated(monkeypatch, capsys, *words, typed: str | None = None) -> str:
    """What is printed."""
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, words)])
    if typed is not None:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    capsys.readouterr()
    generate.main()
    return capsys.readouterr().out


@every_mixer
def test_the_likeliest_tokens_are_those_of_generate(preset, monkeypatch):
    """Of a prompt that is read in pieces, and once more after it was added to."""
    monkeypatch.setattr(writing, "PIECE", 7)
    m = model(preset, num_layers=1).eval()
    writer = Writer(m, None, greedy)
    said = IDS[:1, :0]
    for more in (IDS[:1], IDS[1:, :9]):
        said = torch.cat([said, more], 1)
        writer.read(more[0].tolist())
        wanted = m.generate(
            said, attention_mask=torch.ones_like(said), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert list(writer.write(6)) == wanted[0, said.shape[1] :].tolist()
        said = wanted


def test_memory_is_that_of_the_states():
    """What is held does not grow with the text, but for softmax, whose pairs do (elsewhere a cache grows until memory
    ends, openvinotoolkit/openvino.genai issue 4481)."""
    sizes = {}
    for preset in ("gated_delta", "softmax"):
        writer = Writer(model(preset, num_layers=1).eval(), None, greedy)
        writer.read([1, 2, 3])
        for count, _ in enumerate(writer.write(60)):
            if count in (9, 59):
                sizes[preset, count] = (writer.cache.num_bytes, len(writer.unread))
    assert sizes["gated_delta", 9] == sizes["gated_delta", 59]
    assert sizes["softmax", 59][0] > 4 * sizes["softmax", 9][0]


def test_text_is_shown_when_it_is_certain():
    """Joined it is the whole, whatever the bytes: characters of several tokens are waited for (Blaizzy/mlx-vlm pull
    request 1778, exo-explore/exo pull request 1691), bytes that are none are not waited for for ever
    (openai/harmony pull request 83)."""
    tokenizer = Bytes()
    texts = ["añ🙂文b".encode(), b"\xe4a\xff\xff\xff\xffz\xe4", b"\xf0\x9f" * 3 + b"\x99\x82", b"\xff" * 20]
    texts += [bytes(torch.randint(256, (50,), generator=torch.Generator().manual_seed(i)).tolist()) for i in range(50)]
    for raw in texts:
        pieces = list(shown(raw, tokenizer, list(b"before ")))
        assert "".join(pieces) == raw.decode(errors="replace")
    assert [piece for piece in shown("ñ🙂".encode(), tokenizer, []) if piece] == ["ñ", "🙂"]
    assert sum(map(len, islice(shown(b"\xff" * 10**6, tokenizer, []), 100))) > 95


def test_what_is_drawn():
    """By the probabilities, of the likeliest alone with top_p, and the same for one seed."""
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    cpu = torch.device("cpu")
    choose = sampled(0.5, 1.0, 3, cpu)
    drawn = torch.bincount(torch.tensor([choose(logits) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(drawn, (logits[0] / 0.5).softmax(-1), atol=0.03, rtol=0)
    assert {sampled(1.0, 0.8, seed, cpu)(logits) for seed in range(60)} == {1, 2}
    assert all(sampled(1.0, 0.5, seed, cpu)(logits) == 1 for seed in range(20))
    one, other = (sampled(0.5, 1.0, 7, cpu) for _ in range(2))
    assert [one(logits) for _ in range(20)] == [other(logits) for _ in range(20)]


def test_a_prompt_a_file_and_a_conversation(runs, monkeypatch, capsys, tmp_path):
    """A run, its checkpoint and its exported folder write the same; a conversation is one text."""
    text, eos = runs / "text", Bytes.eos
    m = open_trained(text).model

    def wanted(before: bytes, count: int) -> bytes:
        ids = torch.tensor([list(before)])
        m.generation_config.eos_token_id = None
        seen = torch.ones_like(ids)
        written = m.generate(ids, attention_mask=seen, max_new_tokens=count, do_sample=False, pad_token_id=0)
        assert eos not in written
        return bytes(written[0, ids.shape[1] :].tolist())

    for where in (text, text / "model", next((text / "checkpoints").glob("*.ckpt"))):
        said = generated(monkeypatch, capsys, where, "--prompt", "3 times", "--greedy", "--tokens", "9")
        assert said == "3 times" + wanted(b"3 times", 9).decode(errors="replace") + "\n"
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("1 and\n\n2 and\n")
    rows.write_text('{"prompt": "1 and", "id": 4}\n{"prompt": "2 and"}\n')
    for file in (lines, rows):
        said = generated(monkeypatch, capsys, text, "--prompts", file, "--tokens", "9", "--seed", "5")
        found = [json.loads(line) for line in said.splitlines()]
        assert [row["prompt"] for row in found] == ["1 and", "2 and"] and not any(row["ended"] for row in found)
    alone = generated(monkeypatch, capsys, text, "--prompt", "2 and", "--tokens", "9", "--seed", "5")
    assert alone == "2 and" + found[1]["text"] + "\n", "the prompts before change nothing"

    first = wanted(b"1 and", 4)
    second = wanted(b"1 and" + first, 4)  # an empty line
    third = wanted(b"1 and" + first + second + b"\nso", 4)
    said = generated(monkeypatch, capsys, text, "--greedy", "--tokens", "4", typed="1 and\n\nso\n")
    assert said == "".join(part.decode(errors="replace") + "\n" for part in (first, second, third))


def test_a_text_ends_where_the_model_ends_it(runs, monkeypatch, capsys, tmp_path):
    """And the next line begins another."""
    run = shutil.copytree(runs / "text", tmp_path / "ends")
    m = LanguageModel.from_pretrained(run / "model")
    with torch.no_grad():
        m.norm.weight.zero_()  # all tokens are equally likely, and the first of them is taken
    m.save_pretrained(run / "model")
    assert generated(monkeypatch, capsys, run, "--prompt", "a", "--greedy", "--tokens", "2") == "a\0\0\n"
    monkeypatch.setattr(Bytes, "eos", 0)
    config = json.loads((run / "model" / "tokenizer.json").read_text())
    assert config["added_tokens"]
    (run / "model" / "tokenizer.json").unlink()  # then the config's, Bytes, is taken
    (tmp_path / "p.txt").write_text("a\n")
    said = generated(monkeypatch, capsys, run, "--prompts", tmp_path / "p.txt", "--greedy", "--tokens", "0")
    assert json.loads(said) == {"prompt": "a", "text": "", "ended": True}
    assert generated(monkeypatch, capsys, run, "--greedy", typed="a\n\nb\n") == "\n\n"


def test_what_is_wrong_is_a_sentence(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    run = shutil.copytree(runs / "text", tmp_path / "broken")
    m = LanguageModel.from_pretrained(run / "model")
    torch.nn.init.constant_(m.norm.weight, torch.nan)
    m.save_pretrained(run / "model")
    cases = [
        ([runs / "texd"], "has no 'texd'; did you mean 'text'"),
        ([runs / "recall", "--prompt", "a"], "was not trained on text, and has no tokenizer"),
        ([runs / "text", "--prompt", ""], "a prompt is empty"),
        ([runs / "text", "--prompts", tmp_path / "row.jsonl"], "did you mean 'rows.jsonl'"),
        ([runs / "text", "--prompts", tmp_path / "rows.jsonl"], r"line 2: a row like .* is needed"),
        ([run, "--prompt", "ab"], "the model's output is not finite after 2 tokens"),
    ]
    for words, says in cases:
        with pytest.raises(SystemExit, match=f"^error: .*{says}"):
            generated(monkeypatch, capsys, *words)
    for words, says in (
        (["--temperature", "0"], "must be positive; --greedy"),
        (["--top-p", "1.5"], "must lie above 0"),
        (["--tokens", "-1"], "must be at least 0"),
        (["--prompt", "a", "--prompts", "b"], "not allowed with"),
    ):
        with pytest.raises(SystemExit):
            generated(monkeypatch, capsys, runs / "text", *words)
        assert says in capsys.readouterr().err
