"""evaluate.py finds what a loop by hand finds. Beside a test is where people met its case."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
import wandb

from data.module import Share, collate
from data.text import IGNORE
from data.tokenizer import Bpe
from models.training.weights import open_trained
from scripts import evaluate, generate
from scripts.evaluating import contexts, report, scoring
from tests.conftest import ROOT
from tests.evaluating.conftest import STEP, TEXT, finished
from tests.test_calls import IDS, every_mixer, model
from tests.training.test_sweep import records


def evaluated(monkeypatch, *words) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, words)])
    evaluate.main()


def found(run, name: str = "validation") -> dict:
    return json.loads((run / "evaluations" / f"{name}.json").read_text())


def by_hand(m, sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nats, predictions and targets of one sequence, in one call."""
    batch = collate([sample])
    nats, predictions = m.score(batch["input_ids"], batch["labels"], batch["segments"])
    return nats[0], predictions[0], batch["labels"][0]


@every_mixer
def test_a_sequence_in_pieces_is_one_pass(preset):
    """Loss by position and by what can be seen; packed documents, a last batch that is not full, pieces of any length.
    Elsewhere a state that goes on gives another loss than one pass (fla-org/flash-linear-attention issue 90,
    huggingface/transformers pull request 46084), or memory ends where a sequence is long (state-spaces/mamba issue
    536)."""
    m = model(preset, num_layers=1)
    documents = torch.tensor([[0] * 9 + [1] * 5 + [2] * 6, [0] * 20, [0] * 13 + [1] * 7])
    ids = torch.cat([IDS, IDS.flip(1)[:1]])
    labels = ids.roll(-1, 1).masked_fill(documents.roll(-1, 1) != documents, IGNORE)
    samples = [{"input_ids": x, "labels": y, "segments": z} for x, y, z in zip(ids, labels, documents, strict=True)]
    place, context = torch.zeros(3, 20, dtype=torch.float64), torch.zeros(3, 20, dtype=torch.float64)
    for sample in samples:
        nats, predictions, targets = by_hand(m, sample)
        for t in range(20):
            of = sample["segments"][: t + 1]
            if kept := targets[t] != IGNORE:
                each = torch.tensor([nats[t], kept, predictions[t] == targets[t]], dtype=torch.float64)
                place[:, t] += each
                context[:, int((of == of[-1]).sum()) - 1] += each
    for tokens_at_once in (3, 7, 20, 40, 1000):
        sums = scoring.sums(m, samples, 20, 20, tokens_at_once)
        torch.testing.assert_close(sums.position, place, rtol=0, atol=1e-10)
        torch.testing.assert_close(sums.context, context, rtol=0, atol=1e-10)


def test_every_length_predicts_the_same_tokens(runs, monkeypatch, capsys):
    """1 to 8 times the length of training in one pass are as many passes by hand, and once the length is what training
    validates on. (Elsewhere the loss depends on the batch, ml-explore/mlx-lm pull request 1855; the first window is
    shorter than the others, huggingface/transformers issue 18887; and what a length means is not said,
    jquesnelle/yarn issue 39.)"""
    evaluated(monkeypatch, runs / "text")
    result = found(runs / "text")
    m = open_trained(runs / "text").model
    task = contexts.task_of(open_trained(runs / "text"), result["data"], 16)
    whole = task.validation_samples(128)
    chosen = [i * len(whole) // 4 for i in range(4)]  # 500 tokens are four of 128
    assert len(whole) > 4 and (result["step"], result["seq_len"], result["weights"]) == (STEP, 16, "model")
    for times, row in zip((1, 2, 4, 8), result["lengths"], strict=True):
        samples, total, count = task.validation_samples(16 * times), 0.0, 0
        for window in chosen:
            for piece in range(8 // times):
                nats, _, targets = by_hand(m, samples[window * (8 // times) + piece])
                total, count = total + nats.double().sum().item(), count + int((targets != IGNORE).sum())
        assert (row["length"], row["times"], row["targets"]) == (16 * times, times, count)
        assert row["nats"] == pytest.approx(total / count, rel=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
        assert row["bits_per_byte"] == pytest.approx(total / count / math.log(2) / task.bytes_per_token, rel=1e-6)
        for ranges in (row["by_place"], row["by_position"], row["by_context"]):
            assert sum(part["targets"] for part in ranges) == count
            assert sum(part["nats"] * part["targets"] for part in ranges) == pytest.approx(total, rel=1e-6)
    assert [{**p, "nats": 0} for p in result["lengths"][0]["by_place"]] == [
        {**p, "nats": 0, "accuracy": q["accuracy"]}
        for p, q in zip(result["lengths"][3]["by_place"], result["lengths"][0]["by_place"], strict=True)
    ]
    assert "128 (8x)" in capsys.readouterr().out
    assert (runs / "text" / "evaluations" / "validation.png").stat().st_size > 10_000

    evaluated(monkeypatch, runs / "text", "--times", "1", "--tokens-at-once", "48")
    share = Share(task.validation_samples(16), -(-500 // 16), 8, 0, 1)
    parts = [by_hand(m, share[i]) for i in range(len(share))]
    targets = sum(int((y != IGNORE).sum()) for _, _, y in parts)
    assert found(runs / "text")["lengths"][0]["nats"] == pytest.approx(
        sum(nats.double().sum().item() for nats, _, _ in parts) / targets, rel=1e-6
    )


def test_recall_is_counted(runs, monkeypatch):
    """Longer sequences, and other pairs than in training."""
    evaluated(monkeypatch, runs / "recall", "data.num_pairs=4", "--times", "1", "4", "--tokens", "400")
    rows = found(runs / "recall", "data.num_pairs=4")["lengths"]
    trained = open_trained(runs / "recall")
    task = contexts.task_of(trained, {**trained.config["data"], "num_pairs": 4}, 16)
    for row in rows:
        samples = task.validation_samples(row["length"])
        right = [0] * row["length"]
        for i in range(25):  # 400 tokens of 16
            _, predictions, targets = by_hand(trained.model, samples[i * len(samples) // 25])
            for t in range(row["length"]):
                right[t] += int(predictions[t] == targets[t])
        assert (row["targets"], row["accuracy"]) == (25 * 4, sum(right) / 100)
        assert "bits_per_byte" not in row and row["by_position"][0]["first"] == 0
    assert (runs / "recall" / "evaluations" / "data.num_pairs=4.png").exists()


def test_another_text(runs, monkeypatch, tmp_path):
    """All of it, a file or a folder, in the order of its files; and the tokens after the first that are asked for."""
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("".join(TEXT[i : i + 12]), encoding="utf-8")
    evaluated(monkeypatch, runs / "text", "--text", tmp_path, "--times", "1", "2", "--tokens", "1000000")
    row = found(runs / "text", f"text-{tmp_path.name}")["lengths"][1]
    files = [(tmp_path / f"{i}.txt").read_bytes() for i in range(2)]
    ids = [*files[0], 256, *files[1], 256]
    count = (len(ids) - 1) // 32 * 32
    task = contexts.text_of(open_trained(runs / "text"), [str(tmp_path)], 64)
    assert row["targets"] == count - 1  # the first of the second file is not predicted
    assert task.tokens.num_tokens == 65 and task.bytes_per_token == len(files[0]) / (len(files[0]) + 1)
    both = contexts.text_of(open_trained(runs / "text"), [str(tmp_path)], 10**6)
    tokens = both.tokens.read(0, both.tokens.num_tokens).tolist()
    begins = both.tokens.document_starts(np.array([0]), len(ids))[0]
    assert tokens == ids and begins.nonzero()[0].tolist() == [len(files[0]) + 1]


def test_a_tokenizer_that_was_trained_is_not_trained_again(runs, tmp_path, monkeypatch):
    """On another text the one of the model is taken, from a run that has no model/ too."""
    where = ["data=text_files", f"data.corpus.path={runs.parent / 'texts'}", "data.corpus.validation_fraction=0.4"]
    learnt = Bpe(280)
    run = finished(tmp_path / "bpe", *where, "tokenizer=bpe", "tokenizer.vocab_size=280", tokenizer=learnt)
    (tmp_path / "other").mkdir()
    for i in range(9):
        (tmp_path / "other" / f"{i}.txt").write_text(f"zebras and lemurs, {i}\n" * 40)
    shutil.rmtree(run / "model")
    (run / "result.json").unlink()
    trained = open_trained(run)
    assert (trained.path.name, trained.step) == (f"step-{STEP:09d}.ckpt", STEP)
    node = contexts.data_node(
        trained.config, [f"data.corpus.path={tmp_path / 'other'}", "data.corpus.validation_fraction=0.5"]
    )
    other, own = contexts.task_of(trained, node, 16), contexts.task_of(trained, trained.config["data"], 16)
    text = "".join(TEXT[:30])
    for task in (own, other):
        assert task.tokenizer.encode(text) == learnt.encode(text)
    assert isinstance(own.tokenizer, Bpe) and not isinstance(other.tokenizer, Bpe)
    assert trained.tokenizer().encode(text) == learnt.encode(text)


@pytest.mark.slow
def test_the_same_wandb_run_learns_of_it(runs, tmp_path, monkeypatch):
    """Under the id of the training, at its step, with the picture, and nothing of the training is written anew:
    https://github.com/wandb/wandb/issues/5632 and https://github.com/wandb/wandb/issues/1371 (what is logged at a step
    that is over is lost, and a finished run can't be logged to)."""
    where = ["data=text_files", f"data.corpus.path={runs.parent / 'texts'}", "data.corpus.validation_fraction=0.4"]
    run = finished(tmp_path / "runs" / "w", *where, "logger=wandb")
    moved = shutil.move(run, tmp_path / "moved")
    monkeypatch.setenv("WANDB_MODE", "offline")
    evaluated(monkeypatch, moved, "--times", "1", "--tokens", "64")
    wandb.teardown()  # by then all is written
    (path,) = moved.glob("wandb/offline-run-*/*.wandb")
    everything = records(path)
    assert {r.run.run_id for r in everything if r.HasField("run")} == {"runs-w"}
    logged = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for r in everything
        if r.HasField("history")
        for item in r.history.item
    }
    assert logged["evaluation/validation/nats/16"] == found(moved)["lengths"][0]["nats"]
    assert logged["trainer/global_step"] == STEP and list(moved.glob("wandb/*/files/media/images/evaluation/*.png"))


def test_what_is_wrong_is_a_sentence(runs, tmp_path, monkeypatch, capsys):
    text, checkpoint = runs / "text", f"checkpoints/step-{STEP:09d}.ckpt"
    for name in ("torn", "empty", "other", "damaged"):
        shutil.copytree(text, tmp_path / name)
    (tmp_path / "torn" / checkpoint).write_bytes(b"half")
    (tmp_path / "empty" / "result.json").unlink()
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    config = tmp_path / "other" / "model" / "config.json"
    config.write_text(json.dumps({"model_type": "qwen3"}))
    larger = Bpe(300)
    larger.train(TEXT)
    larger.save(tmp_path / "damaged" / "model")
    alone = shutil.copytree(text / "model", tmp_path / "alone")
    shutil.copy(text / checkpoint, tmp_path / "lost.ckpt")
    shutil.copy(f"{text / checkpoint}.sha256", tmp_path / "lost.ckpt.sha256")
    (tmp_path / "short.txt").write_text("too short")
    cases = [
        ([runs / "texd"], "does not exist: .* has no 'texd'; did you mean 'text'"),
        ([runs], "holds 2 runs; name one of them, such as .*recall"),
        ([tmp_path / "torn" / checkpoint], "is torn: its 4 bytes"),
        ([tmp_path / "empty"], "is a run that has no checkpoint yet"),
        ([tmp_path / "lost.ckpt"], "stands without its run"),
        ([text / "config.yaml"], "is a file, and not a checkpoint"),
        ([runs.parent / "texts"], "neither the folder of a run"),
        ([tmp_path / "other"], "model_type='qwen3'"),
        ([alone], "does not say how long its sequences were; --seq-len N does"),
        ([alone, "--seq-len", "16"], "has no data; say which by data=... or --text PATH"),
        (
            [tmp_path / "damaged", "--text", tmp_path / "short.txt"],
            "another model's tokenizer, of 300 ids: this one knows 257",
        ),
        ([text, "--times", "1", "3", "8"], "3 is not a divisor of 8"),
        ([text, "--times", "4096"], "--times: for sequences of 65,536 tokens .*too long for the validation split"),
        ([text, "--text", tmp_path / "short.txt"], "--times: for sequences of 128 tokens .* has 10 tokens"),
        ([text, "--text", tmp_path / "shord.txt"], "--text=.*has no 'shord.txt'; did you mean 'short.txt'"),
        ([text, "data=wikitexd"], "wikitext"),
        ([text, "data.corpus.paht=x"], "did you mean data.corpus.path=x"),
        ([text, "data=text_files"], r"to be set: data.corpus.path=\.\.\."),
        ([text, "data=mqar", "data.num_pairs=2"], "the data have 8,192 different tokens, and .* knows 257"),
        ([text, "optimizer.lr=1"], "optimizer.lr=1 changes the model or its training; only data="),
        ([runs / "recall", "--text", tmp_path / "short.txt"], "was not trained on text, and --text="),
        ([runs / "recall", "data.num_pairs=9"], "data.num_pairs=9 does not fit seq_len=16"),
    ]
    wrong = []
    for words, says in cases:
        with pytest.raises(SystemExit) as error:
            evaluated(monkeypatch, *words)
        if not re.search(rf"^error: .*{says}", said := str(error.value)):
            wrong.append((says, said))
    assert not wrong, "\n".join(map(str, wrong))
    once = [alone, "--seq-len", "16", "--times", "1", "--name", "own", "--text"]
    evaluated(monkeypatch, *once, runs.parent / "texts")
    assert found(alone, "own")["step"] is None
    with pytest.raises(SystemExit, match=r"is of other data, .*give this one another --name"):
        evaluated(monkeypatch, *once, tmp_path / "short.txt")
    for words in (["--tokens", "0", text], ["data=mqar"]):
        with pytest.raises(SystemExit, match="2"):
            evaluated(monkeypatch, *words)
    assert "must be at least 1" in capsys.readouterr().err


def test_without_lm_eval_a_sentence_says_so(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r"^error: --tasks needs lm-eval, pip install -e '\.\[evaluation\]'"):
        evaluated(monkeypatch, runs / "text", "--tasks", "piqa")


def test_the_commands_of_the_page_can_be_given(runs):
    """And what they evaluate on is there to compose."""
    page = (ROOT / "docs" / "evaluating.md").read_text()
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("    python scripts/")]
    assert len(commands) > 8
    for _, script, *words in commands:
        given = {"scripts/evaluate.py": evaluate, "scripts/generate.py": generate}[script].arguments(words)
        if words := getattr(given, "words", None):
            which = "recall" if "recall" in given.models[0] else "text"
            assert contexts.data_node(open_trained(runs / which).config, words)["_target_"]


def test_which_words_are_settings():
    given = evaluate.arguments(["runs/s/model=mesa,seed=1", "--times", "1", "--tokens", "8", "data.num_pairs=4"])
    assert (given.models, given.words, given.times) == (["runs/s/model=mesa,seed=1"], ["data.num_pairs=4"], [1])


@pytest.mark.slow
def test_tasks_of_lm_eval_are_those_by_hand(runs, tmp_path, monkeypatch):
    """A local task, without a network: which choice has the larger probability, all of it and by its length."""
    pytest.importorskip("lm_eval")
    rows = [
        ("def f", ["(x):", "()"], 0),
        ("import", ["os", "qqq"], 1),
        ("for i", ["zz", "in a"], 1),
        ("a", ["b", "c d"], 0),
    ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": q, "choices": choices, "answer": answer}) + "\n" for q, choices, answer in rows)
    )
    (tmp_path / "mine.yaml").write_text(f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    evaluated(monkeypatch, runs / "text", "--tasks", "mine", "--task-folder", tmp_path, "--name", "mine")
    m = open_trained(runs / "text").model
    right = {"acc": 0, "acc_norm": 0}
    for question, choices, answer in rows:
        nats = []
        for choice in choices:
            ids = torch.tensor([list(f"{question} {choice}".encode())])
            each, _ = m.score(ids[:, :-1], ids[:, 1:])
            nats.append(each[0, len(question) - 1 :].sum().item())
        right["acc"] += nats[answer] == min(nats)
        per = [x / len(choice) for x, choice in zip(nats, choices, strict=True)]
        right["acc_norm"] += per[answer] == min(per)
    result = found(runs / "text", "mine")
    assert {name: result["tasks"]["mine"][name] for name in right} == {name: x / 4 for name, x in right.items()}
    assert report.metrics(result, "mine")["evaluation/mine/mine/acc"] == right["acc"] / 4
