"""A hundred mistakes and more, each refused in one clear sentence that names it, in the first second.

Nothing here trains: what is not refused falls through to a stub, and fails the test.
"""

from __future__ import annotations

import json
import re
import shutil
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from random import Random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from conf.checks import mistakes
from conf.settings import NUMBERS, leaves
from data.batch import batch_arithmetic
from data.module import misfits
from data.text import Text
from data.tokenizer import Bytes, HuggingFace
from models.language_model import LanguageModel, LanguageModelConfig
from models.training.job import assemble
from models.training.preemption import Preemption
from tests.data.conftest import Documents
from tests.test_config import CONF, composed

MIXER = "model.mixers.main"
SETTINGS = {"path": "data.corpus.path", "held_out": "data.corpus.validation"}

# what is typed -> what is said
CONFIGS = {
    # settings of a part, which its class annotates
    "model=yaad model.mixers.main.regressor.delta=null": "regressor.delta=null must be a number",
    "model=memora model.mixers.main.regressor.mass=much": "regressor.mass=much must be a number or null",
    "model=kda model.mixers.main.regressor.negative_eigenvalues=maybe": "eigenvalues=maybe must be true or false",
    "model.mixers.main.decay=none": "main.decay=none must be a part, with a _target_; decay@...decay=none chooses one",
    "data=parity data.train_lengths=40": "data.train_lengths=40 must be two whole numbers",
    "model=tnt model.mixers.main.regressor.local_batches=[a]": "local_batches=['a'] must be a list of whole numbers",
    # numbers that can't be
    "seed=-1": "seed=-1 must be between 0 and 4294967295",
    "seed=4294967296": "seed=4294967296 must be between 0 and 4294967295",
    "seq_len=0": "seq_len=0 must be at least 1",
    "seq_len={{}}": "seq_len={{}} is not a number",
    "seq_len=-128": "seq_len=-128 must be at least 1",
    "batch_tokens=0": "batch_tokens=0 must be at least 1",
    "batch_tokens=-1024": "batch_tokens=-1024 must be at least 1",
    "micro_batch=0": "micro_batch=0 must be at least 1",
    "micro_batch=-8": "micro_batch=-8 must be at least 1",
    "tokens=0": "tokens=0 must be at least 1",
    "tokens=-1": "tokens=-1 must be at least 1",
    "validation_tokens=0": "validation_tokens=0 must be at least 1",
    "validation_tokens=-5": "validation_tokens=-5 must be at least 1",
    "validate_every=0": "validate_every=0.0 must be positive: below 1 a fraction of the run",
    "validate_every=-1": "validate_every=-1.0 must be positive",
    "validate_every=2.5": "validate_every=2.5 must be positive: below 1 a fraction of the run",
    "validate_every=nan": "validate_every=nan is not a finite number",
    "checkpoint_every=0": "checkpoint_every=0.0 must be positive",
    "checkpoint_every=-0.1": "checkpoint_every=-0.1 must be positive",
    "checkpoint_every=inf": "checkpoint_every=inf is not a finite number",
    "keep.newest=0": "keep.newest=0 must be at least 1",
    "keep.every=0": "keep.every=0.0 must be positive: below 1 a fraction of the run",
    "keep.at=[0.5,2.5]": "keep.at[1]=2.5 must be positive: below 1 a fraction of the run",
    "log_every=0": "log_every=0 must be at least 1",
    "log_every=-10": "log_every=-10 must be at least 1",
    "clip_norm=0": "clip_norm=0.0 must be positive; a large one switches clipping off",
    "clip_norm=-1": "clip_norm=-1.0 must be positive",
    "clip_norm=inf": "clip_norm=inf is not a finite number",
    "num_workers=-1": "num_workers=-1 must be at least 0",
    "model.hidden_size=0": "model.hidden_size=0 must be at least 1",
    "model.num_layers=0": "model.num_layers=0 must be at least 1",
    "model.num_layers=-4": "model.num_layers=-4 must be at least 1",
    "model.num_heads=0": "model.num_heads=0 must be at least 1",
    "model.feed_forward=mlp": "model.feed_forward=mlp is not one of swiglu, persistent_memory, in_place",
    "model.feed_forward=persistent_memory model.hidden_size=97 model=softmax": "does not divide hidden_size=97",
    "model.feed_forward_grad_batch=0": "model.feed_forward_grad_batch=0 must be at least 1",
    "model.feed_forward_step_size=-1": "model.feed_forward_step_size=-1.0 must be at least 0",
    "model.feed_forward_grad_batch=8": "model.feed_forward_grad_batch=8 is of model.feed_forward=in_place, and this is",
    "model.feed_forward_size=0": "model.feed_forward_size=0 must be at least 1",
    "model.norm_eps=0": "model.norm_eps=0.0 must be positive",
    f"{MIXER}.num_heads=0": f"{MIXER}.num_heads=0 must be at least 1",
    f"{MIXER}.num_heads=1.5": f"{MIXER}.num_heads=1.5 must be a whole number",
    f"{MIXER}.conv_size=-1": f"{MIXER}.conv_size=-1 must be at least 0",
    f"+{MIXER}.key_dim=0": f"{MIXER}.key_dim=0 must be at least 1",
    f"{MIXER}.decay.step_range=[0,1]": f"{MIXER}.decay.step_range[0]=0 must be positive",
    f"{MIXER}.decay.step_range=[1]": f"{MIXER}.decay.step_range=[1] must be two numbers",
    f"{MIXER}.decay.half_lives=[0,9]": f"{MIXER}.decay.half_lives[0]=0 must be from 0.1 to 1,000,000 tokens",
    f"{MIXER}.decay.half_lives=[1,2e6]": f"{MIXER}.decay.half_lives[1]=2000000.0 must be from 0.1 to 1,000,000 tokens",
    f"{MIXER}.decay.half_lives=9": f"{MIXER}.decay.half_lives=9 must be two numbers or null",
    f"{MIXER}.decay.half_lives=[9,2]": "decay.half_lives=[9, 2] must be two numbers, the larger one behind",
    f"model=softmax {MIXER}.rotary=-1": f"{MIXER}.rotary=-1 must be positive",
    f"model=softmax {MIXER}.regressor.window=0": f"{MIXER}.regressor.window=0 must be at least 1",
    "optimizer.lr=0": "optimizer.lr=0 must be positive",
    "optimizer.lr=-0.1": "optimizer.lr=-0.1 must be positive",
    "optimizer.lr=fast": "optimizer.lr=fast is not a number; it must be positive",
    "optimizer.lr=null": "optimizer.lr=null is not a number; it must be positive",
    "optimizer.lr=true": "optimizer.lr=True is not a number; it must be positive",
    "optimizer.lr=nan": "optimizer.lr=nan is not a finite number",
    "optimizer.eps=0": "optimizer.eps=0 must be positive",
    "optimizer.weight_decay=-0.1": "optimizer.weight_decay=-0.1 must be at least 0",
    "optimizer.betas=[0.9,1.0]": "optimizer.betas[1]=1.0 must be at least 0 and below 1",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9] must be two numbers",
    "optimizer.betas=0.9": "optimizer.betas=0.9 must be two numbers",
    f"{MIXER}=softmax": f"{MIXER}: softmax is not a mixer; mixer@{MIXER}=softmax chooses one",
    "optimizer=muon optimizer.momentum=1": "optimizer.momentum=1 must be at least 0 and below 1",
    "schedule.warmup=-0.1": "schedule.warmup=-0.1 must be at least 0: below 1 a fraction of the run",
    "schedule.warmup=2.5": "schedule.warmup=2.5 must be at least 0: below 1 a fraction of the run, else a whole number",
    "schedule.warmup=100000": "schedule.warmup=100000 must be below 1, a fraction of the run, or a whole number of its",
    "schedule=cosine schedule.warmup=100000": "schedule.warmup=100000 must be below 1",
    "overwrite=true run_dir=/none/a init_from=/none/a/model": "overwrite=true would delete init_from=/none/a/model",
    f"overwrite=true run_dir={Path.home()}/none/a init_from='~/none/a'": "overwrite=true would delete init_from=~/none",
    "schedule.decay=2": "schedule.decay=2 must be between 0 and 1",
    "schedule.warmup=0.6 schedule.decay=0.6": "schedule.warmup=0.6 and schedule.decay=0.6 are together more",
    "schedule=cosine schedule.final=-1": "schedule.final=-1 must be between 0 and 1",
    "data.corpus.validation_fraction=0": "data.corpus.validation_fraction=0 must be between 0 and 1, both excluded",
    "data.corpus.validation_fraction=1": "data.corpus.validation_fraction=1 must be between 0 and 1, both excluded",
    "data=fineweb_edu data.corpus.max_documents=0": "data.corpus.max_documents=0 must be at least 1",
    "data=mqar data.train_size=0": "data.train_size=0 must be at least 1",
    "data=mqar data.validation_size=-1": "data.validation_size=-1 must be at least 1",
    "data=mqar data.power_a=0": "data.power_a=0 must be positive",
    "data=mqar data.power_a=2": "data.power_a=2 must lie above 0 and at most at 1",
    "data=mqar data.num_pairs=0": "data.num_pairs=0 must be at least 1",
    "data=mqar data.num_pairs=33": "data.num_pairs=33 does not fit seq_len=128",
    "data=mqar data.vocab_size=17": "data.vocab_size=17 is too small for data.num_pairs=8",
    "data=mqar data.seed=-1": "data.seed=-1 must be between 0 and 4294967295",
    "tokenizer=bpe tokenizer.vocab_size=0": "tokenizer.vocab_size=0 must be at least 1",
    "tokenizer=bpe tokenizer.vocab_size=200": "tokenizer.vocab_size=200 is too small",
    "tokenizer=bpe tokenizer.train_bytes=0": "tokenizer.train_bytes=0 must be at least 1",
    "callbacks.sample.num_tokens=0": "callbacks.sample.num_tokens=0 must be at least 1",
    "callbacks.regression.num_tokens=1": "callbacks.regression.num_tokens=1 must be at least 2",
    "callbacks.regression.picture_share=2": "callbacks.regression.picture_share=2 must be between 0 and 1",
    "callbacks.sample.temperature=-1": "callbacks.sample.temperature=-1 must be at least 0",
    "trainer.num_nodes=0": "trainer.num_nodes=0 must be at least 1",
    "+trainer.limit_val_batches=-1": "trainer.limit_val_batches=-1 must be at least 0",
    # sizes that don't fit each other
    "batch_tokens=1000": "batch_tokens=1000 is not a multiple of seq_len=128; the nearest are 896 and 1024",
    "seq_len=100": "batch_tokens=1024 is not a multiple of seq_len=100; the nearest are 1000 and 1100",
    "micro_batch=3": "micro_batch=3 does not divide the 8 sequences",
    "tokens=1023": "tokens=1023 is less than one step, batch_tokens=1024",
    "trainer.devices=3": "batch_tokens=1024 is 8 sequences, which 3 devices cannot share equally",
    "model.hidden_size=97": "model.mixers.main: num_heads=3 does not divide hidden_size=97",
    "model.num_heads=5": "model.mixers.main: num_heads=5 does not divide hidden_size=96",
    f"model=softmax {MIXER}.num_kv_heads=2": "model.mixers.main: num_kv_heads=2 does not divide num_heads=3",
    f"+{MIXER}.num_kv_heads=1": "num_kv_heads=1: Delta has a memory per head; only num_kv_heads=3 is possible",
    f"model=softmax +{MIXER}.key_dim=31": "key_dim=31 must be even for rotary positions",
    f"+{MIXER}.value_dim=4096": "nothing is left for the feed-forward layer",
    "+model.vocab_size=100": "model.vocab_size=100 is not a setting",
    # a model that isn't one
    "model.pattern=[]": "model.pattern is empty",
    "model.pattern=[other]": "model.pattern names 'other', and model.mixers has main",
    f"{MIXER}.qk_norm=l3": "qk_norm=l3 is not one of none, l2, rms",
    f"{MIXER}.activation=gelu": "activation=gelu is not one of",
    f"{MIXER}.output_gate=tanh": "output_gate=tanh is not one of",
    f"{MIXER}.regressor.backend=cuda": "regressor.backend='cuda' is not a backend",
    f"{MIXER}.regressor.backend=fla": "regressor.backend=fla can't run Delta here",
    f"{MIXER}._target_=models.mixers.Mixr": f"{MIXER}._target_=models.mixers.Mixr does not exist",
    "model=softmax decay@model.mixers.main.decay=scalar": "Softmax cannot have a ScalarDecay; possible choices of ",
    # data and tokenizers that aren't there
    "data=text_files": "to be set: data.corpus.path=...",
    "data=text_files data.corpus.path=/nowhere/*.txt": "data.corpus.path='/nowhere/*.txt' matches no file",
    "data=text_files {path}=''": "{path}='' names nothing; a file, a folder or a pattern is needed",
    "data=text_files {path}={files}/*.png": "{path}='{files}/*.png' matches nothing that can be read, but 1 .png; what",
    "data=text_files {path}={files}/a.txt {held_out}=/nowhere": "data.corpus.validation='/nowhere' matches",
    "data=text_files {path}={files}/a.txt {held_out}={files}/*.txt": "share 1 files, such as {files}",
    "data=text_files {path}={files}/a.txt data.corpus.separator=''": "data.corpus.separator='' can't separate",
    "data=text_files {path}={files}/a.txt data.corpus.invalid_utf8=skip": "invalid_utf8='skip' is not one of error",
    "data.name=a/b": "data.name='a/b' names a folder",
    "data=fineweb_edu data.corpus.validation_split=train": "validation_split='train' is the training split too",
    "tokenizer=hugging_face tokenizer.name={files}": "tokenizer.name='{files}' can't be loaded",
    # a machine that isn't there
    "trainer.devices=0": "trainer.devices=0 is not a number of devices, a list of their ids, or auto",
    "trainer.devices=-2": "trainer.devices=-2 is not a number of devices",
    "trainer.devices=two": "trainer.devices=two is not a number of devices",
    "trainer.devices=[]": "trainer.devices=[] is not a number of devices",
    "trainer.devices=[0,0]": "trainer.devices=[0, 0] names a device twice",
    "strategy=hsdp trainer.devices=4 trainer.strategy.replicas=3": "replicas=3 does not divide the 4 device(s)",
    "strategy=ddp trainer.devices=1 trainer.strategy.reduction=half": "reduction=half is not one of float32, bfloat16",
    "trainer.accelerator=cuda": "trainer.accelerator=cuda is not there: torch sees no CUDA device",
    "trainer.accelerator=gpu": "trainer.accelerator=gpu is not there: torch sees no GPU",
    "trainer.accelerator=tpuu": "trainer.accelerator=tpuu is not one of auto, cpu",
    "trainer.precision=fp8": "trainer.precision=fp8 is not one of 32-true, bf16-mixed",
    "trainer.precision=float16": "trainer.precision=float16 is not one of 32-true",
    "trainer.precision=16-mixed": "trainer.precision=16-mixed can't run on a CPU; bf16-mixed can",
    "trainer.strategy=dpp": "trainer.strategy=dpp is not a strategy",
    # what would have no effect
    "+trainer.max_steps=5": "trainer.max_steps=5 would have no effect: set tokens",
    "+trainer.max_epochs=1": "trainer.max_epochs=1 would have no effect: set tokens",
    "+trainer.accumulate_grad_batches=2": "would have no effect: set batch_tokens and micro_batch",
    "+trainer.gradient_clip_val=1.0": "trainer.gradient_clip_val=1.0 would have no effect: set clip_norm",
    "+trainer.val_check_interval=10": "trainer.val_check_interval=10 would have no effect: set validate_every",
    "trainer.use_distributed_sampler=true": "trainer.use_distributed_sampler=true would shuffle",
    # names and places
    "name=''": "name='' names a folder below runs/",
    "name=../elsewhere": "name='../elsewhere' names a folder below runs/",
    "run_dir={files}/a.txt/run": "run_dir={files}/a.txt/run: {files}/a.txt is a file, not a folder",
    "seq_len='${{nothing}}'": "seq_len: Interpolation key 'nothing' not found",
    # what does not belong
    "optimizer._target_=os.system": "optimizer._target_=os.system is not allowed",
    "optimizer._target_=torch.load": "optimizer._target_=torch.load is not allowed; it is not a class of torch",
    "optimizer._target_=torch.hub.load": "optimizer._target_=torch.hub.load is not allowed",
    f"{MIXER}._target_=models.language_model.build": "build is not allowed; it is not a class of",
    f"{MIXER}.decay._target_=models.training.run.Path": "models.training.run.Path is not allowed",
    f"{MIXER}.decay._target_=subprocess.Popen": f"{MIXER}.decay._target_=subprocess.Popen is not allowed",
    "+callbacks.mine._target_=builtins.eval": "callbacks.mine._target_=builtins.eval is not allowed",
    # misspelt
    "+model.num_layer=4": "model.num_layer=4 is not a setting; did you mean model.num_layers?",
    "+sede=4": "sede=4 is not a setting; did you mean seed?",
    f"+{MIXER}.zzzz=3": f"{MIXER}.zzzz=3 is not a setting of models.mixers.Mixer; it has regressor, decay,",
    f"+{MIXER}.regressor.zzzz=3": "is not a setting of models.regression.linear.Delta; it has backend, chunk, step,",
    f"+{MIXER}.regressor.sizes=3": f"{MIXER}.regressor.sizes=3 is not a setting of models.regression.linear.Delta",
    "+optimizer.learning_rate=0.1": "optimizer.learning_rate=0.1 is not a setting of",
    f"+{MIXER}.n_head=4": f"{MIXER}.n_head=4 is not a setting of models.mixers.Mixer",
    "+data.corpus.pth=x": "data.corpus.pth=x is not a setting of data.corpora.PythonSource",
    "+callbacks.sample.num_token=3": "callbacks.sample.num_token=3 is not a setting of",
}


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    (folder / "a.png").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def nothing_trains(monkeypatch):
    def stub(*arguments, **settings):
        raise AssertionError("this was not refused")

    monkeypatch.setattr(
        "lightning.seed_everything", stub
    )  # the first thing that assemble does with a config it accepts
    monkeypatch.setattr("lightning.Trainer.fit", stub)


choices = cache(composed)  # Hydra takes a quarter of a second for what it reads from files
NODES = {name: name for name in ("model", "data", "tokenizer", "optimizer", "schedule", "logger")}
NODES |= {"strategy": "trainer"}  # groups, and the node of the config that is all that they fill


def chosen(groups):
    """What Hydra composes of these choices: where each fills a node of its own, of configs with one choice each."""
    names = [choice.split("=")[0] for choice in groups]
    if not NODES.keys() >= set(names):
        return deepcopy(choices(*groups))
    cfg = deepcopy(choices())
    for name, choice in zip(names, groups, strict=True):
        cfg[NODES[name]] = choices(choice)[NODES[name]]
    return cfg


def test_every_choice_fills_a_node_of_its_own():
    groups = ["model=hybrid", "optimizer=muon", "schedule=cosine", "data=mqar", "tokenizer=bpe", "strategy=fsdp"]
    groups += ["logger=wandb"]
    assert OmegaConf.to_container(chosen(groups)) == OmegaConf.to_container(composed(*groups))
    assert len(groups) == len(NODES)


def typed_config(overrides):
    """What Hydra would compose: the choices of groups by itself, the values as it sets them."""
    groups = [o for o in overrides if (CONF / o.split("=")[0].split("@")[0]).is_dir()]
    cfg = chosen(groups)
    for override in OverridesParser.create().parse_overrides([o for o in overrides if o not in groups]):
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=override.is_add())
    return cfg


def said_of(typed: str, files) -> str:
    """What assemble says of these overrides."""
    with pytest.raises(Exception) as caught:
        assemble(typed_config(tuple(part.format(files=files, **SETTINGS) for part in typed.split(" "))), Preemption())
    assert type(caught.value) is ValueError, repr(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("typed", CONFIGS)
def test_a_mistake_in_the_config(typed, files):
    said = said_of(typed, files)
    assert CONFIGS[typed].format(files=files, **SETTINGS) in said
    assert "\n" not in said, "one mistake, one sentence"


def test_several_mistakes_are_told_at_once(files):
    typed = "seq_len=100 optimizer.lr=-1 model.num_heads=5 trainer.devices=0 tokens=2000 +sede=1 data=text_files"
    sentences = said_of(f"{typed} tokenizer=bpe tokenizer.vocab_size=9", files).split("\n       ")
    wrong = [
        "to be set: data.corpus.path=",
        "sede=1 ",
        "optimizer.lr=-1 ",
        "trainer.devices=0 ",
        "model.mixers.main: num_",
    ]
    assert len(sentences) == 6 and "tokenizer.vocab_size=9 is too small" in sentences[5]
    assert all(sentence.startswith(setting) for sentence, setting in zip(sentences, wrong, strict=False)), sentences


LONG = "seq_len={} is too long for the {} split of data=text, which has {} tokens; at most {} fit"


# settings that are fine by themselves and do not fit the data
@pytest.mark.parametrize(
    "seq_len, sequences, said",
    [
        (64, 1, [LONG.format(64, "train", 60, 59), LONG.format(64, "validation", 12, 11)]),
        (12, 1, [LONG.format(12, "validation", 12, 11)]),
        (4, 100, ["batch_tokens=400 is 100 sequences of seq_len=4, and the data has 14 to train on"]),
        (4, 2, []),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_data(tmp_path, monkeypatch, seq_len, sequences, said):
    monkeypatch.setenv("TTR_CACHE", str(tmp_path))
    task = Text(Documents(["x" * 59], ["y" * 11]), Bytes(), seq_len)
    task.prepare()
    size = seq_len * sequences
    assert misfits(task, batch_arithmetic(size, seq_len, sequences, 1, size)) == said


# harm to the folder of a model -> what from_pretrained says
def edited(**changes):
    def harm(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            node = config
            *way, last = key.split("__")
            for name in way:
                node = node[name]
            node[last] = value
        path.write_text(json.dumps(config))

    return harm


def cut(name):
    def harm(folder):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: len(raw) // 2])

    return harm


MODELS = {
    "no such folder": (shutil.rmtree, "copy is not the folder of a model: it has no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "copy is not the folder of a model: it has no config.json"),
    "a torn config": (cut("config.json"), "is not a valid JSON file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "torn weights": (cut("model.safetensors"), "incomplete metadata|buffer|header"),
    "another width": (edited(hidden_size=32), "mismatch|size"),
    "a smaller vocabulary": (edited(vocab_size=100), "mismatch|size"),
    "a class from elsewhere": (edited(mixers__main___target_="os.system"), "os.system is not allowed"),
    "a class of torch": (edited(mixers__main___target_="torch.nn.Linear"), "torch.nn.Linear is not allowed"),
    "a class of the data": (edited(mixers__main___target_="data.files.TextFiles"), "TextFiles is not allowed"),
    "a part from elsewhere": (
        edited(mixers__main__decay___target_="subprocess.Popen"),
        "subprocess.Popen is not allowed",
    ),
    "through an import": (
        edited(mixers__main___target_="models.language_model.build"),
        "language_model.build is not allowed",
    ),
    "hidden in a list": (
        edited(mixers__main__rotary=[{"_target_": "os.system"}]),
        r"rotary\[0\]._target_=os.system is not",
    ),
    "a class that isn't": (
        edited(mixers__main___target_="models.mixers.Mixr"),
        "models.mixers.Mixr does not exist",
    ),
    "a setting that isn't": (
        edited(mixers__main__shell="rm"),
        "shell=rm is not a setting of models.mixers.Mixer",
    ),
    "a pattern of others": (edited(pattern=["other"]), "model.pattern names 'other', and model.mixers has main"),
    "no pattern": (edited(pattern=[]), "model.pattern is empty"),
    "heads that don't divide": (edited(mixers__main__num_heads=3), "num_heads=3 does not divide hidden_size=16"),
}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = OmegaConf.to_container(composed("model.hidden_size=16", "model.num_layers=1", "model.num_heads=2").model)
    model = OmegaConf.to_container(OmegaConf.create({"model": sizes}), resolve=True)["model"]
    LanguageModel(LanguageModelConfig(vocab_size=257, **model)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("harm", MODELS)
def test_a_model_folder_that_is_not_right(saved_model, tmp_path, harm):
    folder = tmp_path / "copy"
    shutil.copytree(saved_model, folder)
    LanguageModel.from_pretrained(folder)
    spoil, said = MODELS[harm]
    spoil(folder)
    with pytest.raises(Exception, match=said):
        LanguageModel.from_pretrained(folder)


def test_code_in_a_model_folder_is_never_run(saved_model, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "copy"
    shutil.copytree(saved_model, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edited(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(folder)
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)) is LanguageModel
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tok", None]}}))
    with pytest.raises(ValueError, match=r"tokenizer.name='.*' can't be loaded"):
        HuggingFace(str(folder))
    assert not (tmp_path / "ran").exists()


TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    "typed, said",
    [
        (f"name={TOKEN}", "name holds a secret, by its looks"),
        (
            "logger=wandb logger.wandb.project=0123456789abcdef",
            "project holds a secret, that of the environment variable",
        ),
        ("logger=wandb +logger.wandb.api_key=anything", "logger.wandb.api_key holds a secret, by its name"),
        ("+hf_token=anything", "hf_token holds a secret, by its name"),
        ("name=${{oc.env:WANDB_API_KEY}}", "name holds a secret, that of the environment variable WANDB_API_KEY"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(typed, said, files, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    told = said_of(typed, files)
    assert said in told
    assert not any(secret in told for secret in (TOKEN, "0123456789abcdef", "=anything"))


def test_secrets_of_the_environment_are_in_no_config(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = OmegaConf.to_yaml(composed("logger=wandb", "data=fineweb_edu", "tokenizer=bpe"), resolve=True)
    assert not re.search(f"{TOKEN}|0123456789abcdef", config)
    assert mistakes(composed("logger=wandb", "data=fineweb_edu", "tokenizer=bpe")) == []


VALID = {  # what is typed, of which any combination is right
    "model": ["gated_delta", "softmax", "hybrid"],
    "optimizer": ["adamw", "muon"],
    "schedule": ["wsd", "cosine"],
    "data": ["python_source", "mqar", "fineweb_edu"],
    "tokenizer": ["bytes", "bpe"],
    "strategy": ["single", "ddp", "fsdp"],
    "logger": ["csv", "wandb"],
    "model.num_heads": [1, 2, 3, 6],
    "model.num_layers": [1, 5],
    "model.tie_embeddings": ["true", "false"],
    "model.feed_forward": ["swiglu", "persistent_memory", "in_place"],
    "model.feed_forward_size": ["null", 200],
    "micro_batch": [1, 4, 8, 100],
    "batch_tokens": [2048, 8192],
    "tokens": [8192, 10**9],
    "validate_every": [0.01, 0.999, 1, 50],
    "checkpoint_every": [0.5, 7],
    "clip_norm": [0.1, 1e9],
    "num_workers": [0, 3],
    "seed": [0, 2**32 - 1],
    "optimizer.lr": ["1e-5", 0.1],
    "optimizer.betas": ["[0,0]", "[0.9,0.999]"],
    "optimizer.weight_decay": [0, 1],
    "schedule.warmup": [0, 0.3],
    "trainer.devices": [1, 2, "auto"],
    "trainer.precision": ["32-true", "bf16-mixed", 64],
    "+trainer.limit_val_batches": [0, 1.0],
}


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(i, marks=pytest.mark.slow) for i in range(20, 60))])
def test_any_combination_of_right_settings_is_right(seed):
    random = Random(seed)
    some = [name for name in VALID if random.random() < 0.6]
    overrides = tuple(f"{name}={random.choice(VALID[name])}" for name in some)
    assert mistakes(typed_config(overrides)) == [], overrides


@pytest.mark.parametrize("model", ["gated_delta", "softmax", "hybrid"])
def test_what_is_right_is_assembled(model, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TTR_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"document {i} of them all" for i in range(2000)))
    overrides = (f"model={model}", "data=text_files", f"data.corpus.path={text}", "data.corpus.separator='\n'")
    sizes = ("seq_len=16", "batch_tokens=64", "micro_batch=2", "tokens=640", f"run_dir={tmp_path}/run", "num_workers=2")
    settings = (*overrides, *sizes, "validation_tokens=100", "data.corpus.validation_fraction=0.1")
    trainer, module, datamodule, run, _ = assemble(typed_config(settings), Preemption())
    assert (trainer.max_steps, trainer.accumulate_grad_batches) == (10, 2)
    assert module.model.config.vocab_size == 257 and run.config["name"] and datamodule.task.vocab_size == 257


def test_every_number_has_a_bound():
    """In train.yaml and what it chooses from. What a part of a mixer takes, its class checks."""
    spared = re.compile(r"model\.mixers\..*\.(decay|features|regressor)\.|trainer\.devices|\.step_size")
    for groups in ((), ("data=mqar", "schedule=cosine"), ("tokenizer=bpe", "optimizer=muon"), ("data=fineweb_edu",)):
        for path, value in leaves(OmegaConf.to_container(typed_config(groups), resolve=True)):
            if isinstance(value, int | float) and not isinstance(value, bool) and not spared.search(path):
                assert any(fnmatchcase(path, pattern) for pattern in NUMBERS), path


def test_there_are_a_hundred():
    from tests.data.test_files import BROKEN
    from tests.data.test_shards import DAMAGES

    assert len(CONFIGS) + len(MODELS) + len(BROKEN) + len(DAMAGES) >= 180
