"""Going on from a finished run: with more tokens, or with its weights alone.

What others were asked: https://github.com/flairNLP/flair/issues/1824, https://github.com/mosaicml/composer/issues/1384
(a finished run given more steps takes none, or takes them at a rate of zero),
https://github.com/deepinsight/insightface/pull/2143 (the schedule keeps the old length),
https://github.com/PrimeIntellect-ai/prime-rl/pull/1095 (a branch off a stable phase),
https://github.com/Lightning-AI/pytorch-lightning/issues/1982, https://github.com/torchmd/torchmd-net/issues/86 (the
weights alone), https://github.com/Lightning-AI/pytorch-lightning/issues/4690 (of another shape).
"""

from __future__ import annotations

import json
import re
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from data.tokenizer import Bpe, Bytes
from models.build import build
from models.language_model import LanguageModel
from models.training import weights
from models.training.branch import branch, common_steps
from models.training.checkpoint import Checkpoint, WholeFiles, mark, newest_whole, step_of
from models.training.keep import steps_to_keep
from models.training.preemption import Preemption
from models.training.run import Run, difference
from models.training.schedule import end_of_plateau, warmup_cosine, warmup_stable_decay
from tests.started import Started
from tests.test_language_model import model
from tests.training.test_run import rows
from tests.training.test_sweep import JOB, environment

WSD = {"_target_": "models.training.schedule.warmup_stable_decay", "_partial_": True, "warmup": 0.1, "decay": 0.5}
COSINE = {"_target_": "models.training.schedule.warmup_cosine", "_partial_": True, "warmup": 3}
LONGER = ["name=run", "tokens=2560", "schedule.warmup=2"]  # 20 steps


def started(folder, cache, *words: str) -> str:
    return Started(folder, [*JOB, "model.num_heads=2", *words], environment(folder, cache)).end()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A run of ten steps, of which the last five are its decay. The checkpoint of step 3 stays."""
    folder = tmp_path_factory.mktemp("finished")
    assert "finished" in started(folder, cache, "name=run", "schedule.warmup=2", "keep.at=[3]")
    return folder


@pytest.mark.slow
def test_more_tokens_are_the_longer_run_in_one_go(finished, tmp_path, cache):
    """Every weight, every number of the optimizer and of the random state, and what was logged of every step."""
    shutil.copytree(finished / "run", tmp_path / "twice" / "run")
    said = started(tmp_path / "twice", cache, *LONGER)
    assert "goes on from step 5" in said and "finished" in said, said
    started(tmp_path / "once", cache, *LONGER)
    ours, theirs = tmp_path / "twice" / "run", tmp_path / "once" / "run"
    assert same_to_the_bit(ours, theirs) == 20
    trained = [
        [{k: v for k, v in row.items() if k.startswith("train/")} for row in rows(run)] for run in (ours, theirs)
    ]
    assert trained[0] == trained[1] and len(trained[0]) == 20
    results = [json.loads((run / "result.json").read_text()) for run in (ours, theirs)]
    assert all(results[0][name] == value for name, value in results[1].items() if name.startswith("validation/"))
    assert (results[0]["from_step"], results[1]["from_step"], results[0]["tokens"]) == (5, 0, 2560)
    before = json.loads((ours / "result-10.json").read_text())
    assert before == json.loads((finished / "run" / "result.json").read_text())
    assert LanguageModel.from_pretrained(ours / "model-10").num_parameters() > 0
    assert "is finished" in started(tmp_path / "twice", cache, *LONGER)
    said = started(tmp_path / "twice", cache, *LONGER, "seed=1")
    assert "another config" in said and "seed: 0 before, 1 now" in said


def same_to_the_bit(ours, theirs) -> int:
    """Whether the last checkpoints are. Returns their step."""
    a, b = (torch.load(newest_whole(run / "checkpoints")[0], weights_only=True) for run in (ours, theirs))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "guard", "callbacks"):
        assert str(a[part]) == str(b[part]), part
    assert all(torch.equal(x, b["state_dict"][name]) for name, x in a["state_dict"].items())
    return a["global_step"]


@pytest.mark.slow
def test_an_earlier_decay_begins_at_a_checkpoint_that_stayed(finished, tmp_path, cache):
    """And is the run that had this decay from the first step on."""
    shutil.copytree(finished / "run", tmp_path / "twice" / "run")
    words = ["name=run", "schedule.warmup=2", "schedule.decay=0.7"]
    assert "goes on from step 3" in started(tmp_path / "twice", cache, *words)
    started(tmp_path / "once", cache, *words)
    assert same_to_the_bit(tmp_path / "twice" / "run", tmp_path / "once" / "run") == 10
    assert (tmp_path / "twice" / "run" / "checkpoints" / "step-000000003.ckpt").exists()


@pytest.mark.slow
def test_other_data_from_its_weights(finished, tmp_path, cache):
    words = [f"init_from={finished / 'run'}", "data.seed=5", "optimizer.lr=1e-12", "optimizer.weight_decay=0"]
    said = started(tmp_path, cache, "name=new", *words)
    assert f"weights   of {finished / 'run' / 'model'}" in said and "finished" in said, said
    a, b = (LanguageModel.from_pretrained(run / "model").state_dict() for run in (finished / "run", tmp_path / "new"))
    assert all(torch.allclose(a[name], b[name], atol=1e-9) for name in a)
    assert torch.load(newest_whole(tmp_path / "new" / "checkpoints")[0], weights_only=True)["global_step"] == 10
    said = started(tmp_path, cache, "name=wide", "model.hidden_size=64", words[0])
    assert said.startswith(f"error: {words[0]} holds another model: embedding.weight is 64 x 32 there and 64 x 64 here")
    said = started(tmp_path, cache, "name=none", f"init_from={tmp_path}")
    assert said.startswith(f"error: init_from={tmp_path} holds 2 runs; name one of them, such as {tmp_path / 'new'}")


def test_weights_of_a_run_that_is_not_finished_and_of_another_vocabulary(tmp_path):
    torch.manual_seed(1)
    theirs, ours = model("softmax", vocab_size=257), model("softmax", vocab_size=257)
    saved = {"state_dict": {f"model.{name}": value for name, value in theirs.state_dict().items()}}
    WholeFiles().save_checkpoint(saved, tmp_path / "checkpoints" / "step-000000003.ckpt")
    assert weights.load(ours, str(tmp_path)).endswith("step-000000003.ckpt")
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())
    assert weights.load(ours, None) == ""
    for name, there in (("same", Bytes()), ("other", Bpe(257))):
        if isinstance(there, Bpe):
            there.train(["to be, or not to be"])
        theirs.save_pretrained(tmp_path / name)
        there.save(tmp_path / name)
    assert "embedding" not in weights.load(ours, str(tmp_path / "same"), Bytes())
    assert "embedding 257 rows are those of tokens with the same text, and 0 begin anew" in weights.load(
        ours, str(tmp_path / "other"), Bytes()
    )


def checkpoint_of(m: LanguageModel, run, **config) -> None:
    saved = {"state_dict": {f"model.{name}": value for name, value in m.state_dict().items()}}
    WholeFiles().save_checkpoint(saved, run / "checkpoints" / "step-000000003.ckpt")
    names = ("hidden_size", "num_layers", "mixers", "pattern", "norm_eps")
    config |= {"model": {name: getattr(m.config, name) for name in names}, "seq_len": 8}
    OmegaConf.save(OmegaConf.create(config), run / "config.yaml")


def test_a_checkpoint_is_of_the_vocabulary_that_its_run_learnt(tmp_path, monkeypatch):
    monkeypatch.setenv("TTR_CACHE", str(tmp_path / "cache"))

    def settings(text: str) -> dict:
        (tmp_path / f"{text}.txt").write_text(f"{text} " * 999)
        corpus = {"_target_": "data.files.TextFiles", "path": str(tmp_path / f"{text}.txt")}
        bpe = {"_target_": "data.tokenizer.Bpe", "vocab_size": 260}
        return {"data": {"_target_": "data.text.Text", "corpus": corpus}, "tokenizer": bpe}

    m = model("softmax", vocab_size=260).float()
    checkpoint_of(m, tmp_path, **settings("abcdef"))
    for text in ("abcdef", "uvwxyz"):
        ours = settings(text)
        task = build(ours["data"], tokenizer=build(ours["tokenizer"]), seq_len=8)
        task.prepare()
        if text == "abcdef":
            assert "warning" not in weights.load(m, str(tmp_path), task.tokenizer)
            continue
        said = weights.load(m, str(tmp_path), task.tokenizer)
        assert re.search(r"embedding 257 rows .*, and 3 begin anew .*tokenizer=hugging_face tokenizer\.name=", said)


def test_other_settings_of_the_same_shapes_are_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    theirs, ours = model("softmax").float(), model("softmax", norm_eps=0.5).float()
    checkpoint_of(theirs, tmp_path / "run")
    theirs.save_pretrained(tmp_path / "exported")
    ours.config.mixers = {"softmax": ours.config.mixers["softmax"] | {"rotary": 10}}
    for name in ("~/run", "~/exported"):
        assert "warning" not in weights.load(theirs, name)
        said = weights.load(ours, name).splitlines()
        assert len(said) == 2 and said[1].startswith(f"warning: init_from={name} was trained with other settings: ")
        assert "model.mixers.softmax.rotary: 10000.0 before, 10 now; " in said[1]
        assert said[1].endswith("model.norm_eps: 1e-06 before, 0.5 now")


def test_a_start_of_gates_that_are_trained_is_told(tmp_path):
    theirs, ours = (model("kda", num_layers=1).float() for _ in range(2))
    theirs.save_pretrained(tmp_path)
    ours.config.mixers = deepcopy(ours.config.mixers)
    (recipe,) = ours.config.mixers.values()
    recipe["decay"] |= {"half_lives": [22, 2840]}
    assert weights.load(ours, str(tmp_path)).splitlines()[1:] == [
        f"warning: init_from={tmp_path} has gates that are trained: model.mixers.kda.decay.half_lives=[22, 2840] has "
        "no effect"
    ]
    recipe["decay"]["half_lives"] = None
    recipe["rotary"] = 10
    assert "half_lives" not in (said := weights.load(ours, str(tmp_path))) and "other settings: model.mixers" in said


def run_with(folder, steps, **now) -> tuple[Run, dict]:
    """A run of a hundred steps of ten tokens, with empty checkpoints of these steps, that shall be another."""
    before = {"name": "a", "overwrite": False, "tokens": 1000, "batch_tokens": 10, "seed": 0, "schedule": WSD}
    for step in steps:
        WholeFiles().save_checkpoint({}, folder / "checkpoints" / f"step-{step:09d}.ckpt")
    before |= now.pop("before", {})
    return Run(folder, before | now), before


def test_where_a_longer_run_branches_off(tmp_path, capsys):
    fixed = WSD | {"warmup": 10}
    run, before = run_with(tmp_path, [20, 50, 90, 100], tokens=3000, schedule=fixed)
    assert common_steps(before, run.config) == 50
    assert branch(run, before, main_process=False) == 50 and len(list(run.checkpoints.glob("*.ckpt"))) == 4
    assert branch(run, before, main_process=True) == 50
    assert newest_whole(run.checkpoints)[0].name == "step-000000050.ckpt"
    # what each branch has left is set aside, and none is taken for the next one's
    for names in ({"result-100.json", "model-100"}, {"result-100-2.json", "model-100-2"}):
        (tmp_path / "result.json").write_text("{}")
        (tmp_path / "model").mkdir()
        branch(run, before, main_process=True)
        assert names < {path.name for path in tmp_path.iterdir()} and not (tmp_path / "result.json").exists()
    # and a shorter one, or one with another decay, where it begins to fall
    run, before = run_with(tmp_path, [20, 50], tokens=600, schedule=fixed)
    assert common_steps(before, run.config) == 30 and branch(run, before, main_process=False) == 20
    run, before = run_with(tmp_path, [20, 50], schedule=WSD | {"decay": 0.2})
    assert branch(run, before, main_process=False) == 50
    run, before = run_with(tmp_path, [20, 50], tokens=3000, seed=1)
    assert branch(run, before, main_process=False) is None


@pytest.mark.parametrize(
    "steps, settings, says",
    [
        ([90, 100], {"before": {"schedule": COSINE}}, "since step 5, and .* init_from="),
        ([50, 100], {}, r"since step 1, and .* warmup.* with schedule\.warmup=10 it goes on"),
        ([90, 100], {"schedule": WSD | {"warmup": 10}}, "since step 51, and .* init_from="),
    ],
    ids=["cosine", "a warmup that grows", "no checkpoint from before the decay"],
)
def test_where_there_is_none_a_sentence_says_what_to_do(steps, settings, says, tmp_path):
    if "before" in settings:
        settings = settings | settings["before"]
    run, before = run_with(tmp_path, steps, tokens=3000, **settings)
    with pytest.raises(ValueError, match=rf"tokens=3000 is another length than the 1000 of .*{says}"):
        branch(run, before, main_process=True)
    assert len(list(run.checkpoints.glob("*.ckpt"))) == len(steps)


def test_the_end_of_a_plateau():
    assert end_of_plateau(warmup_stable_decay(100, warmup=10, decay=0.5), 100) == 50
    assert end_of_plateau(warmup_stable_decay(100, warmup=0, decay=0), 100) is None
    assert end_of_plateau(warmup_cosine(100, warmup=0.1), 100) is None
    assert warmup_stable_decay(100, warmup=10)(9) == warmup_stable_decay(100, warmup=0.1)(9) == 10 / 11


def test_a_setting_that_is_younger_than_a_run_is_no_difference():
    assert difference({"seed": 0}, {"seed": 0, "init_from": None}) == ""
    assert difference({"seed": 0}, {"seed": 0, "init_from": "runs/a"}) != ""


def test_which_checkpoints_stay():
    nothing = {"newest": 2, "every": None, "at": [], "doubling": False}
    assert steps_to_keep(nothing, 100) == set()
    assert steps_to_keep(nothing | {"every": 0.3}, 100) == steps_to_keep(nothing | {"every": 30.0}, 100) == {30, 60, 90}
    assert steps_to_keep(nothing | {"at": [0.001, 0.25, 70.0], "doubling": True}, 100) == {
        1, 2, 4, 8, 16, 32, 64, 25, 70}  # fmt: skip
    with pytest.raises(ValueError, match=r"keep\.at names step 101, and the run has 100"):
        steps_to_keep(nothing | {"at": [101]}, 100)


def saved_by(tmp_path, steps, **settings) -> Checkpoint:
    """The callback at work on these steps, of which each third is due."""
    found = Checkpoint(tmp_path, 3, 1000, Preemption(), **settings)
    trainer = SimpleNamespace(is_global_zero=True, max_steps=1000, global_step=steps[0] - 1)
    trainer.strategy = SimpleNamespace(broadcast=lambda x: x)
    trainer.save_checkpoint = lambda path: found.files.save_checkpoint({}, path)
    found.on_train_start(trainer, None)
    for step in steps:
        trainer.global_step = step
        found._end_of_step(trainer)
    return found


def test_what_was_to_stay_stays_whatever_is_said_later(tmp_path):
    """Others were unclear about the two rules, or deleted the wrong ones:
    https://github.com/PrimeIntellect-ai/prime-rl/pull/1430,
    https://github.com/kingoflolz/mesh-transformer-jax/issues/141,
    https://github.com/huggingface/transformers/issues/27138."""

    def there() -> list[int]:
        return sorted(map(step_of, tmp_path.glob("*.ckpt")))

    saved_by(tmp_path, range(1, 11), kept=frozenset({5}), plateau=4)
    assert there() == [4, 5, 6, 9]
    saved_by(tmp_path, range(10, 20))  # another keep and schedule: what was marked stays
    assert there() == [5, 15, 18]
    saved_by(tmp_path, range(19, 26), newest=3, kept=frozenset({18}))
    assert there() == [5, 18, 21, 24]


def test_what_was_to_stay_of_later_steps_is_moved(tmp_path):
    run, before = run_with(tmp_path, [40, 50, 60, 95, 100], before={"schedule": WSD | {"warmup": 10}})
    for step in (40, 60):
        mark(run.checkpoints / f"step-{step:09d}.ckpt")
    run.config |= {"tokens": 3000}
    assert branch(run, before, main_process=True) == 50
    assert sorted(path.name for path in (tmp_path / "checkpoints-100").iterdir()) == [
        "step-000000060.ckpt", "step-000000060.ckpt.sha256", "step-000000060.keep"]  # fmt: skip
    assert sorted(map(step_of, run.checkpoints.glob("*.ckpt"))) == [40, 50]
    before = dict(run.config)
    run.config |= {"schedule": WSD | {"warmup": 10, "decay": 0.85}}  # a decay from step 45 on begins at an earlier one
    assert branch(run, before | {"schedule": WSD | {"warmup": 10}}, main_process=False) == 40


def test_two_branches_of_the_same_length_lie_apart_and_a_kill_between_files_loses_none(tmp_path, monkeypatch):
    early = {"schedule": WSD | {"warmup": 10, "decay": 0.85}}  # a decay from step 15 on
    run, before = run_with(tmp_path, [10, 40, 60], before={"schedule": WSD | {"warmup": 10}}, **early)
    (run.checkpoints / "step-best.keep").touch()  # somebody's own
    marks = [run.checkpoints / f"step-{step:09d}.ckpt" for step in (40, 60)]
    for path in marks:
        mark(path)
    replace, moved = Path.replace, []

    def killed(path, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(replace(path, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        branch(run, before, main_process=True)
    assert branch(run, before, main_process=True) == 10
    names = {path.name for path in (tmp_path / "checkpoints-100").iterdir()}
    assert len(names) == 6 and all(path.name in names and f"{path.name}.sha256" in names for path in marks)
    WholeFiles().save_checkpoint({}, marks[0])
    mark(marks[0])
    assert branch(run, before, main_process=True) == 10
    assert len(list((tmp_path / "checkpoints-100").iterdir())) == 6
    assert len(list((tmp_path / "checkpoints-100-2").iterdir())) == 3
