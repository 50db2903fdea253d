"""What is mistyped on the command line is told in one sentence with the near match, whoever finds it, and nothing is
begun; and it is told before torch is imported."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import train as entry
from conf.command import flags, named
from conf.help import first_line
from conf.settings import whole_numbers
from data.prepare import prepare
from data.tokenizer import Bytes
from models.build import allowed_packages, near
from scripts import prepare_data
from tests.conftest import ROOT
from tests.data.conftest import Documents

MAIN = "model.mixers.main"
REPORTS = "https://github.com/hydra-ecosystem/hydra/issues"

# what is typed -> what is said of it
GROUPS = {
    # an option that is not there: Hydra prints all of them, and the search path
    "model=gated_dleta": "model=gated_dleta is not there; did you mean model=gated_delta?",
    "model=Gated-Delta": "model=Gated-Delta is not there; did you mean model=gated_delta?",
    "size=340M": "size=340M is not there; did you mean size=340m?",
    "size=340": "size=340 is not there; did you mean size=340m?",
    "experiment=nope": "experiment=nope is not there; there are ablation, ",
    "debug=overfitt": "debug=overfitt is not there; did you mean debug=overfit?",
    "mixer@model.mixers.main=delat": "=delat is not there; did you mean mixer@model.mixers.main=deltanet?",
    "mixer@model.mixers.main=mamba": "=mamba is not there; did you mean mixer@model.mixers.main=baseline/mamba?",
    "mixer@model.mixers.main=baseline/lstn": "did you mean mixer@model.mixers.main=baseline/lstm?",
    f"decay@{MAIN}.decay=scaler": f"=scaler is not there; did you mean decay@{MAIN}.decay=scalar?",
    "+mixer@model.mixers.two=softmx": "=softmx is not there; did you mean mixer@model.mixers.two=softmax?",
    # a group that is not there
    "mixer@model.mixer.main=mesa": "is not a setting; did you mean mixer@model.mixers.main=mesa?",
    "mixr@model.mixers.main=mesa": "names no setting; did you mean mixer@model.mixers.main=mesa?",
    "startegy=ddp": "startegy=ddp is not a setting; did you mean strategy?",
    "hydra/launchr=basic": "is not a setting; did you mean hydra/launcher?",
    # with a sign where there is none
    "+model=softmax": "+model=softmax: the config has one already; write model=softmax",
    "++model=softmax": "++model=softmax: the config has one already; write model=softmax",
    "~model=softmax": "~model=softmax is not what the config has; ~model takes away whatever it is",
    "~modle": "~modle names no setting; did you mean ~model?",
}
KEYS = {
    f"perferences.trait=i # {REPORTS}/1912": "perferences.trait=i is not a setting; there are batch_tokens, callbacks",
    f"{MAIN}.regressor.bakend=torch": f"is not a setting; did you mean {MAIN}.regressor.backend?",
    "model.mixer.main.num_heads=3": "is not a setting; did you mean model.mixers.main.num_heads?",
    f"{MAIN}.num_kv_head=1": f"is not a setting; did you mean {MAIN}.num_kv_heads?",
    f"{MAIN}.key_dim=32": f"{MAIN}.key_dim=32 is not written in the config; a + before it adds it: +{MAIN}.key_dim=32",
    "data=mixture data.weights.web=3": "web=3 is not written in the config; a + before it adds it: +data.weights.web=3",
    "data=mixture data@data.parts.a=wikitext": "is not written in the config; a + before it adds it: +data@data.parts",
    "data=mixture +data.weights=[3,1]": "data.weights has a setting for each name; +data.weights.NAME=3 adds one",
    "hidden_size=128": "hidden_size=128 is not a setting; did you mean model.hidden_size?",
    "lr=0.1": "lr=0.1 is not a setting; did you mean optimizer.lr?",
    "trainer.max_epochs=3": "trainer.max_epochs=3 would have no effect: set tokens",
    f"hydra.sweep.dri=x # {REPORTS}/1457": "hydra.sweep.dri=x is not a setting; did you mean hydra.sweep.dir?",
    f"model={{widht:1}} # {REPORTS}/947": "model={widht:1} is not a setting; there are feed_forward,",
    "++sede=3": "sede=3 is not a setting; did you mean seed?",
    "~seed": "seed is missing: every run needs it",
    "~optimizer": "optimizer is missing: every run needs one",
    "+callbacks.smaple.num_tokens=3": "callbacks.smaple has no class, _target_=...; did you mean callbacks.sample?",
    "clip_norm=fast": "clip_norm=fast must be a number",
    "compile=ja": "compile=ja must be true or false",
    "recompute=ja": "recompute=ja is not one of auto, none, all, or how many of the blocks (0 to 4)",
    "recompute=5": "recompute=5 is more than the 4 blocks of model.num_layers=4; recompute=all takes them all",
    "keep=2": "keep=2 must be one of its settings: keep.newest=, keep.every=, keep.at=, keep.doubling=",
    "keep.at=0.5": "keep.at=0.5 must be a list, like keep.at=[0.5]",
    "keep.at=[a]": "keep.at=[a] must be a number",
}
SIGNS = {
    f"model # {REPORTS}/902": "model has no value: a setting is NAME=VALUE; did you mean model=...?",
    "softmax": "softmax has no value: a setting is NAME=VALUE; did you mean model=softmax?",
    "model softmax": "model softmax: a setting is joined to its value by =: model=softmax",
    "model: softmax": "model: softmax: a setting is joined to its value by =: model=softmax",
    "model = softmax": "model = softmax: there is no space around =: model=softmax",
    # https://github.com/Skype-line/X-Avatar/issues/21
    "run_dir= a/b.pkl": "run_dir= a/b.pkl: there is no space around =: run_dir=a/b.pkl",
    "model==softmax": "model==softmax has one = too many; did you mean model=softmax?",
    f"batch-tokens=8 # {REPORTS}/2363": "batch-tokens=8 is not a setting; did you mean batch_tokens?",
    f"name=a/epoch=9.ckpt # {REPORTS}/1577": "a text with signs is quoted twice: name=\"'a/epoch=9.ckpt'\"",
    # https://github.com/NVIDIA/cloudai/issues/557
    '"name=it\'s"': "a text with signs is quoted twice: name=\"'it\\'s'\"",
    "model.pattern=[main, main]": "is broken off at a space; write 'model.pattern=[main,main]'",
    f"model=softmax,mesa # {REPORTS}/712": "is several values, which only a sweep takes (train.py -m)",
    "tokens=1,000,000": "a number has no commas: tokens=1000000",
    "seed=range(3)": "seed=range(3) is several values, which only a sweep takes (train.py -m)",
    # flags
    f"--model=softmax # {REPORTS}/514": "--model=softmax: a setting has no hyphens before it: model=softmax",
    f"-model softmax # {REPORTS}/446": "a setting has no hyphens before it and = behind it: model=softmax",
    "--multirunn": "--multirunn is not a flag; did you mean --multirun?",
    # https://github.com/hydra-ecosystem/hydra/pull/3133
    "seed=1 -m model=mesa": "model=mesa: put flags before all settings, or behind them",
    "--cfg jobs": "argument --cfg/-c: invalid choice: 'jobs'",
    "--config-dir /nowhere": "Additional config directory '/nowhere' not found",
}
SWEEPS = {
    "-m model=mesa,softmx": "model=softmx is not there; did you mean model=softmax?",
    "-m seed=1,2 sede=3": "sede=3 is not a setting; did you mean seed?",
    "-m sede=1,2": "sede=1,2 is not a setting; did you mean seed?",
    "-m seed=1,2 run_dir=a": "run_dir=a: each job of a sweep has a folder of its own; leave it out, and name the sweep",
}
NUMBERS = {
    "tokens=1e400": "tokens=inf is not a finite number",
    "micro_batch=nan": "micro_batch=nan is not a finite number",
    "tokens=2M": "tokens=2M is not a number; write 2e6",
    "tokens=1.5e0": "tokens=1.5 must be a whole number",
    "micro_batch=5": "micro_batch=5 does not divide the 8 sequences that each of 1 device(s) has in a step",
    "seq_len=abc": "seq_len=abc is not a number; it must be at least 1",
}
TYPED = NUMBERS | GROUPS | KEYS | SIGNS | SWEEPS


@pytest.mark.parametrize("typed", TYPED)
def test_a_mistyped_word_is_told_in_one_sentence(typed, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *_, **__: None)  # composes once more to no end
    monkeypatch.setattr("sys.argv", ["train.py", *shlex.split(typed, comments=True)])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        entry.main()
    assert not GlobalHydra.instance().is_initialized()
    said = stop.value.code
    assert isinstance(said, str) and said.startswith("error: ") and TYPED[typed] in said
    assert "\n" not in said and capfd.readouterr() == ("", ""), "one sentence, and nothing else"
    assert not list(tmp_path.glob("runs/*[!l]")), "nothing was begun, but for a sweep's multirun.yaml"


def test_who_asks_for_hydras_own_error_has_it(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("sys.argv", ["train.py", "model=gated_dleta"])
    with pytest.raises(Exception, match="Available options in 'model'"):
        entry.main()


def test_the_data_is_prepared_by_the_same_words(monkeypatch):
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "data=fineweb_edo", "+verify=true"])
    with pytest.raises(SystemExit, match=r"^error: data=fineweb_edo is not there; did you mean data=fineweb_edu\?$"):
        prepare_data.main()


def test_what_is_not_hydras_is_not_caught(monkeypatch, tmp_path):
    """A mistake of the program itself has its traceback."""

    def broken(*arguments):
        raise ValueError("a mistake of ours")

    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setattr("conf.settings.mistakes", broken)
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(ValueError, match="a mistake of ours"):
        entry.main()


def test_help_has_a_line_for_every_choice(monkeypatch, tmp_path, capsys):
    """The first of its file, with those of an own folder."""
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "huge.yaml").write_text("# @package _global_\n\n# Costs $9 an hour\nseed: 1\n")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", ["train.py", "model=titans", f"hydra.searchpath=[file://{tmp_path}]", "--help"])
    with pytest.raises(SystemExit):
        entry.main()
    lines = capsys.readouterr().out.splitlines()
    told = {" ".join(line.split()) for line in lines}  # how far apart depends on the longest name
    for line in (
        "model=",
        "softmax A transformer: softmax attention in every layer.",
        "* titans Titans with a linear memory in every layer.",
        "huge Costs $9 an hour",
        "* tiny Half a million parameters and the bytes: what two CPU cores train in four minutes",
        "mixer@model.mixers.main=",
    ):
        assert line in told, line
    shown = {line.split()[line[2] == "*"] for line in lines if line.startswith(("    ", "  * "))}
    files = list((ROOT / "conf").glob("*/*.yaml"))
    assert {path.stem for path in files} | {"baseline/lstm"} <= shown and max(map(len, lines)) <= 100
    assert lines.index("data=") < lines.index("model=") < lines.index("size=") < lines.index("mixer@model.mixers.main=")
    assert all(map(first_line, files))


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback():
    """train.py --help | head -1, and scripts/evidence.py mqar --jobs | head -1."""
    for words in (["train.py", "--help"], ["scripts/evidence.py", "mqar", "--jobs"]):
        with subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            process.stdout.close()
            assert (process.wait(120), process.stderr.read()) == (141, "")


@pytest.mark.parametrize("words", ["--help", "-m seed=1,2", "--cfg job --resolve", "-c job -p model", "-i", "-sc"])
def test_flags_that_hydra_has_are_let_through(words):
    assert flags(words.split()) is None


def said(monkeypatch, *words: str) -> str:
    """What main ends with; a config that is right goes no further than the first of the run's own steps."""
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    monkeypatch.setattr("lightning.seed_everything", lambda *_, **__: sys.exit("assembled"))
    with pytest.raises(SystemExit) as stop:
        entry.main()
    return str(stop.value.code)


def test_whole_numbers_as_people_write_them():
    """https://github.com/snowflakedb/ArcticTraining/issues/165, https://github.com/facebookresearch/fairseq/issues/2935"""
    written = {"tokens": 1e6, "seq_len": "128", "clip_norm": 1.0, "tokenizer": {"vocab_size": 3.2e4, "name": "1e3"}}
    cfg = OmegaConf.create(written | {"micro_batch": "${tokens}", "batch_tokens": 2.5, "log_every": "2M"})
    whole_numbers(cfg)
    told = OmegaConf.to_container(cfg, resolve=True)
    assert told == {
        **{"tokens": 1000000, "seq_len": 128, "clip_norm": 1.0, "tokenizer": {"vocab_size": 32000, "name": "1e3"}},
        **{"micro_batch": 1000000, "batch_tokens": 2.5, "log_every": "2M"},
    }
    assert type(told["tokens"]) is type(told["tokenizer"]["vocab_size"]) is int and type(told["clip_norm"]) is float


def test_numbers_of_the_command_line_and_the_home_folder(monkeypatch, tmp_path):
    """2_000_000 and 1e6 are numbers, and so is a variable of the environment; ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "~/r")
    monkeypatch.setenv("WORKERS", "0")
    given = ("tokens=1e6", "batch_tokens=8_192", "seq_len=1.28e2", "num_workers=${oc.env:WORKERS}", "name=mine")
    assert said(monkeypatch, *given) == "assembled"
    assert (tmp_path / "r" / "mine").is_dir()


def test_places_that_can_not_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS", str(tmp_path))
    assert "aaa can't be made (File name too long); RUNS, name= and run_dir= say" in said(
        monkeypatch, f"name={'a' * 300}"
    )
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUNS", f"{tmp_path}/file")
    assert "can't be made (Not a directory); RUNS, name= and run_dir= say" in said(monkeypatch)
    with pytest.raises(ValueError, match=r"file can't be written \(it is a file, not a folder\); TTR_CACHE names"):
        prepare(Documents(["x"], ["y"]), Bytes(), tmp_path / "file" / "corpus")


def test_a_config_that_is_never_read_is_told(monkeypatch, tmp_path):
    """Of two folders with a file of one name Hydra reads the first."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    (tmp_path / "mixer").mkdir()
    (tmp_path / "mixer" / "softmax.yaml").write_text("# mine\n")
    told = said(monkeypatch, f"hydra.searchpath=[file://{tmp_path}]", "model=softmax")
    assert f"{tmp_path}/mixer/softmax.yaml would never be read; give it another name" in told
    monkeypatch.setenv("TTR_PACKAGES", "data")
    with pytest.raises(ValueError, match="TTR_PACKAGES=data: 'data' is taken; give your package another name"):
        allowed_packages()


@pytest.mark.slow
def test_torch_is_not_imported_to_tell_a_mistake():
    """It takes two seconds, and Lightning and transformers four more."""
    heavy = "{'torch', 'lightning', 'transformers', 'datasets', 'fla', 'wandb', 'matplotlib', 'pyarrow'}"
    code = f"import sys, train\ntry: train.main()\nfinally: print(sorted({heavy} & sys.modules.keys()))"
    for words in (["modle=softmax"], ["micro_batch=5"], ["--cfg", "job"]):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", (words, done.stderr)
        assert bool(done.returncode) == (words[0] != "--cfg")


def test_the_near_match():
    assert near("Gated-Delta", ["gla", "gated_delta", "delta"]) == "gated_delta"
    assert near("delat", ["lact", "deltanet"]) == "deltanet"  # the first letters are seldom wrong
    assert near("transformer", ["gla", "mesa"]) is None and near("x", []) is None


def test_a_sweep_without_a_name_is_called_after_its_settings():
    """And not put into the folders of runs by themselves, which its jobs would be called like."""
    for words, name in (
        ("-m model=mesa,softmax seed=1,2", "sweep-model-seed"),
        ("model.mixers.main.regressor.window=4,8 seed=3 --multirun", "sweep-window"),
        ("-m seed=range(1,3) decay@model.mixers.main.decay=none,scalar", "sweep-decay-seed"),
        ("-m", "sweep"),
        ("-m experiment=recall seed=1,2", "sweep-seed"),  # whose name holds the model
    ):
        given = words.split()
        found = named(given)
        assert [word for word in found if word not in given] == [f"name={name}"]
        assert [word for word in found if word in given] == given and flags(found) is None
    for words in (["-m", "name=s", "seed=1,2"], ["seed=1"], ["-m", "seed=[1"], ["-m", "experiment=mqar", "seed=1,2"]):
        assert named(words) == words
