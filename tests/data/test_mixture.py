"""A mixture: shares, the same stream for every number of ranks and after a resume, validation part by part.

What others met: weights that were not kept (https://github.com/bigscience-workshop/Megatron-DeepSpeed/pull/97), and
mixtures that could not be resumed (https://github.com/Lightning-AI/litData/issues/363), or not on several nodes
(https://github.com/Lightning-AI/litData/issues/248).
"""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.batch import batch_arithmetic
from data.mixing import MixedOrder, between, counts, shares_of
from data.mixture import Mixture, Source, by_source, together
from data.module import DataModule
from data.text import IGNORE
from data.tokenizer import Bpe, Bytes
from models.training.module import Training
from tests.conftest import ROOT
from tests.data.test_module import attached
from tests.test_config import composed
from tests.test_language_model import model

SIZES, WEIGHTS, NAMES = (5000, 700, 90), (5, 3, 2), ("web", "code", "books")


def order(batch: int, steps: int, world: int = 1, rank: int = 0, first_step: int = 0, **changed) -> MixedOrder:
    split = batch_arithmetic(batch, 1, 1, world, batch * steps)
    parts = {"sizes": SIZES, "weights": WEIGHTS, "names": NAMES} | changed
    return MixedOrder(**parts, batch=split, seed=3, rank=rank, first_step=first_step)


def stream(*arguments, **settings) -> list[int]:
    return [index for batch in order(*arguments, **settings) for index in batch]


@pytest.mark.parametrize("weights", [(5, 3, 2), (1, 1, 1), (0.7, 0.29, 0.01), (1000, 1, 1)])
def test_a_share_is_never_off_by_a_sample(weights):
    """Which is 0.1 % of 10^6 tokens in sequences of up to 1,000."""
    shares = shares_of(weights)
    parts, numbers = between(0, 4000, shares)
    seen = np.cumsum(parts[:, None] == np.arange(3), axis=0)
    assert np.abs(seen - np.arange(1, 4001)[:, None] * shares).max() < 1
    assert (numbers == seen[np.arange(4000), parts] - 1).all()
    for start in (0, 1, 17, 1999, 3999, 4000):
        assert counts(start, shares).tolist() == (seen[start - 1] if start else np.zeros(3)).tolist()
        later = between(start, 4000, shares)
        assert (later[0] == parts[start:]).all() and (later[1] == numbers[start:]).all()


def test_after_a_million_tokens_the_shares_are_right_to_a_thousandth():
    seq_len, batch = 512, 32
    indices = np.array(stream(batch, -(-(10**6) // (batch * seq_len))))
    counted = np.histogram(indices, [0, 5000, 5700, 5790])[0] / len(indices)
    assert np.abs(counted - np.array([0.5, 0.3, 0.2])).max() < 0.001


def test_the_same_stream_for_every_number_of_ranks_and_after_a_resume():
    whole = stream(1024, 2)
    for world, step in ((8, 0), (8, 1), (1024, 1)):
        ranks = [stream(1024, 2, world, rank, first_step=step) for rank in range(world)]
        assert [index for row in zip(*ranks, strict=True) for index in row] == whole[1024 * step :]
    begun = order(64, 50)
    assert [index for step in range(50) for index in begun.samples(step).tolist()] == stream(64, 50)
    for step in (1, 31, 49):
        assert stream(64, 50, first_step=step) == stream(64, 50)[64 * step :]
        assert order(64, 50).samples(step).tolist() == begun.samples(step).tolist()  # of no step before it


def test_every_sample_of_a_part_comes_once_a_pass_and_then_in_another_order():
    books = [index - 5700 for index in stream(100, 20) if index >= 5700]
    assert len(books) == 400
    passes = [books[i : i + 90] for i in range(0, 360, 90)]
    assert all(sorted(each) == list(range(90)) for each in passes) and passes[0] != passes[1]


def test_a_part_does_not_depend_on_the_others():
    def books(**changed):
        return [i for i in stream(100, 40, **changed) if i >= sum(changed["sizes"][:-1])]

    three = books(sizes=SIZES, weights=WEIGHTS, names=NAMES)
    two = books(sizes=(300, 90), weights=(1, 1), names=("other", "books"))
    first = [i - 5700 for i in three][:500], [i - 300 for i in two][:500]
    assert first[0] == first[1]


PATHS = ("path", "validation")
TEXTS = {"web": "wwww www wwwwww www ", "code": "cc = ccccc + ccc\n", "books": "bbbbb bbbb bb. bbb."}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, dict]:
    """Nodes as conf/data/text_files.yaml has them."""
    folder, found = tmp_path_factory.mktemp("parts"), {}
    for number, (name, text) in enumerate(TEXTS.items()):
        (folder / name).mkdir()
        for split in ("train", "validation"):
            (folder / name / f"{split}.txt").write_text(text * (40 if split == "validation" else 100 * 2**number))
        paths = {"path": str(folder / name / "train.txt"), "validation": str(folder / name / "validation.txt")}
        corpus = {"_target_": "data.files.TextFiles", **paths}
        found[name] = {"_target_": "data.text.Text", "name": name, "corpus": corpus}
    return found


@pytest.fixture
def mixture(parts) -> Mixture:
    task = Mixture(parts, {"web": 5, "code": 3, "books": 2}, Bytes(), seq_len=16)
    task.prepare()
    return task


def module(task, batch=20, steps=100, **settings) -> DataModule:
    split = batch_arithmetic(batch * 16, 16, 2, 1, batch * 16 * steps)
    return DataModule(task, split, **{"seed": 3, "validation_tokens": 3 * 160, **settings})


def test_tokens_come_from_the_parts_by_their_weights(mixture):
    samples, step = mixture.train_samples(), mixture.order(module(mixture).batch, seed=3).samples(0)
    at_once = samples.__getitems__(step.tolist())
    assert all(rows.tolist() == [samples[i][name].tolist() for i in step.tolist()] for name, rows in at_once.items())
    rows = [mixture.tokenizer.decode(row) for row in at_once["input_ids"]]
    assert [sum(letter in row for row in rows) for letter in "wcb"] == [10, 6, 4]


@pytest.mark.parametrize("world", [1, 3, 8])
def test_each_part_is_validated_on_the_same_tokens_for_every_number_of_ranks(mixture, world):
    rows: dict[int, list] = {0: [], 1: [], 2: []}
    for rank in range(world):
        for batch in attached(module(mixture), rank, world).val_dataloader():
            labelled = (batch["labels"] != IGNORE).any(-1)
            rows[batch["part"]] += map(tuple, batch["input_ids"][labelled].tolist())
    for number, samples in enumerate(mixture.validation_parts()):
        own = [tuple(samples[i * len(samples) // 10]["input_ids"].tolist()) for i in range(10)]
        assert sorted(rows[number]) == sorted(own)


def test_the_whole_is_the_mean_by_shares_however_much_of_a_part_was_validated_on():
    each = torch.rand(2, 2, 8, dtype=torch.float64)
    sources = (Source("a", 0.75, 1.0), Source("b", 0.25, 4.0))
    nats = [(sums[0].sum() / sums[1].sum()).item() for sums in each]
    told = by_source(each, sources)
    assert told["validation/b/bits_per_byte"] == pytest.approx(nats[1] / math.log(2) / 4)
    whole = together(each * torch.tensor([1.0, 100.0]).view(2, 1, 1), sources)
    assert (whole[0].sum() / whole[1].sum()).item() == pytest.approx(0.75 * nats[0] + 0.25 * nats[1])


def test_a_validation_that_is_cut_short_tells_of_the_parts_that_it_has_seen():
    """As debug=one_batch does, by trainer.limit_val_batches."""
    found: dict = {}
    sources = (Source("a", 0.75, 1.0), Source("b", 0.25, 4.0))
    training = Training(model("linear"), None, lambda num_steps: None, 1, 1.0, bytes_per_token=1.75, sources=sources)
    training.trainer = SimpleNamespace(global_step=3)
    training.progress, training.log_dict = dict, lambda metrics, **_: found.update(metrics)
    training._validation = {(0, 0): torch.rand(2, 8, dtype=torch.float64)}
    training.on_validation_epoch_end()
    assert found["validation/nats"] == pytest.approx(found["validation/a/nats"]) and "validation/b/nats" not in found


def test_passes_over_each_part_are_told_before_the_run(mixture):
    lines = mixture.passes(module(mixture).batch)
    assert "web: 50 % of the tokens, 16,000, 8 passes over its 2,000: its text runs out in step 13" in lines[0]
    shorter = mixture.passes(module(mixture, steps=2).batch)
    assert shorter[2] == "books: 20 % of the tokens, 128, 0.0168 passes over its 7,600"


def test_fewer_tokens_to_validate_on_are_said_of_each_part(mixture):
    told = module(mixture, validation_tokens=3 * 700).describe()[-1]
    assert told == "code: validation_tokens=2100 / 3 is more than are held out: all 672 are validated on"


def test_what_must_stay_for_a_run_to_go_on(mixture, parts):
    again = Mixture(parts, {"web": 50, "code": 30, "books": 20}, Bytes(), seq_len=16)
    other = Mixture(parts, {"web": 1, "code": 1, "books": 1}, Bytes(), seq_len=16)
    for task in (again, other):
        task.prepare()
    assert again.identity == mixture.identity != other.identity
    alone = mixture.parts["web"]
    assert alone.folder.exists() and alone.identity["tokenizer"] == mixture.identity["tokenizer"]


def test_one_tokenizer_learns_from_all_parts(parts, capsys):
    weights = {"web": 1, "code": 1, "books": 1}
    first = Mixture(parts, weights, Bpe(300), seq_len=4)
    first.prepare()
    again = Mixture(parts, weights, Bpe(300), seq_len=4)
    again.prepare()
    assert capsys.readouterr().out.count("Training the tokenizer") == 1
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert {(text.folder / "tokenizer").exists() for text in first.parts.values()} == {True}
    for text in TEXTS.values():
        assert len(first.tokenizer.encode(text * 10)) < 0.5 * len(text * 10)


def test_the_file_of_the_docs_is_a_choice_of_data(tmp_path):
    (text,) = re.findall(r"```yaml\n(# Web pages and code.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(text)
    found = composed("data=mine", f"hydra.searchpath=[file://{tmp_path}]", "data.parts.web.corpus.max_documents=9").data
    assert found.weights == {"web": 3, "code": 1} and list(found.parts) == ["web", "code"]
    assert found.parts.web.corpus.max_documents == 9 and found.parts.code.name == "python_source"


def test_mistakes_name_the_setting(parts):
    def made(nodes, weights):
        return Mixture(nodes, weights, Bytes(), seq_len=16)

    web = {"web": parts["web"]}
    with pytest.raises(ValueError, match=r"data.parts=\{\} names no corpus; \+data@data.parts.NAME=fineweb_edu adds"):
        made({}, {})
    with pytest.raises(ValueError, match=r"data.weights=\{'wob': 1\} must .* \(web\) .*; \+data.weights.web=1 "):
        made(web, {"wob": 1})
    two = web | {"code": parts["code"]}
    with pytest.raises(ValueError, match=r"data.weights=\{'web': 3\} must .* \(web, code\) .*; \+data.weights.code=1 "):
        made(two, {"web": 3})
    with pytest.raises(ValueError, match=r"\(web\) and for nothing else; ~data.weights.code takes one away"):
        made(web, {"web": 3, "code": 1})
    with pytest.raises(ValueError, match=r"data.parts.web is a mixture, and a part is one corpus; "):
        made({"web": {"_target_": "data.mixture.Mixture", "parts": {}, "weights": {}}}, {"web": 1})
    with pytest.raises(ValueError, match=r"data.weights.web=0 must be a positive number"):
        made(web, {"web": 0})
    with pytest.raises(ValueError, match=r"data.parts.a.b is a part of metrics' names: letters"):
        made({"a.b": parts["web"]}, {"a.b": 1})
    with pytest.raises(ValueError, match=r"data.parts.task is data.synthetic.AssociativeRecall, and a mixture is of"):
        made({"task": {"_target_": "data.synthetic.AssociativeRecall", "num_pairs": 2}}, {"task": 1})
    gone = {"_target_": "data.text.Text", "corpus": {"_target_": "data.files.TextFiles", "path": "/nowhere"}}
    with pytest.raises(ValueError, match=r"^data.parts.web.corpus.path='/nowhere' matches no file"):
        made({"web": gone}, {"web": 1})


@pytest.mark.slow
def test_a_run_on_a_mixture_validates_and_goes_on(train, parts):
    corpora = [f"+data@data.parts.{name}=text_files" for name in ("web", "code")]
    corpora += [f"data.parts.{n}.corpus.{k}={parts[n]['corpus'][k]}" for n in ("web", "code") for k in PATHS]
    small = (
        "size=tiny model=linear model.hidden_size=16 model.num_layers=1 model.num_heads=1 seq_len=16 batch_tokens=128"
    )
    words = ["name=mixed", "data=mixture", *corpora, "+data.weights.web=3", "+data.weights.code=1", *small.split()]
    words += ["tokens=512", "validation_tokens=256", "callbacks.sample=null", "callbacks.regression=null"]
    said = train(*words).said
    assert "data      web: 75 % of the tokens, 384, 0.192 passes over its 2,000\n" in said
    result = json.loads((train.runs / "mixed" / "result.json").read_text())
    nats = [result[f"validation/{name}/nats"] for name in ("web", "code")]
    assert result["validation/nats"] == pytest.approx(0.75 * nats[0] + 0.25 * nats[1], rel=1e-6)
    per_byte = [result[f"validation/{name}/bits_per_byte"] for name in ("web", "code")]
    assert min(per_byte) <= result["validation/bits_per_byte"] <= max(per_byte)
    changed = train(*(word.replace("web=3", "web=2") for word in words)).said
    assert "data.weights.web: 3 before, 2 now" in changed
