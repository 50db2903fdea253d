"""The config: every choice composes and builds, and every mistake is one sentence that names the setting."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import chain, zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import train as entry
from conf import schema
from conf.settings import batch
from models.build import build, current, problems
from models.language_model import LanguageModel, LanguageModelConfig

CONF = Path(__file__).parents[1] / "conf"
BASES = {"model/base"}  # parts of others, not choices
NETWORK = {"data/fineweb_edu", "data/slimpajama", "data/wikitext", "tokenizer/hugging_face"}
CHOICES = {path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml")} - BASES
PARTS = sorted(choice for choice in CHOICES if choice.startswith(("decay/", "features/", "regressor/")))
MIXERS = {path.stem for path in (CONF / "mixer").glob("*.yaml")}
MODELS = sorted(choice for choice in CHOICES if choice.startswith("model/") and Path(choice).name in MIXERS)
REST = sorted(c for c in CHOICES.difference(PARTS, MODELS) if not c.startswith("mixer/"))


def composed(*overrides: str):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["name=test", "run_dir=/none", *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return cfg


def together() -> Iterator[tuple[str, ...]]:
    """Each choice once, those of several groups in one config; but an overlay alone, since it chooses of other groups
    too."""
    groups: dict[str, list[str]] = defaultdict(list)
    for choice in REST:
        groups[choice.split("/")[0]].append(choice)
    for overlay in ("debug", "experiment"):
        yield from ((choice,) for choice in groups.pop(overlay))
    for chosen in zip_longest(*groups.values()):
        yield tuple(choice for choice in chosen if choice)


@pytest.mark.parametrize("choices", together(), ids=" ".join)
def test_every_choice_composes_and_names_what_exists(choices):
    extra = ["data.corpus.path=x"] if "data/text_files" in choices else []
    cfg = composed(*(choice.replace("/", "=") for choice in choices), *extra)
    assert list(problems(OmegaConf.to_container(cfg, resolve=True))) == []


def test_every_part_of_a_mixer_composes_and_names_what_exists():
    """Each in a mixer of its own, all composed at once: Hydra takes a fifth of a second for a config."""
    parts = [choice.split("/") for choice in PARTS]
    cfg = composed(*(f"+{group}@model.mixers.{group}_{name}.{group}={name}" for group, name in parts))
    found = OmegaConf.to_container(cfg, resolve=True)
    assert all(found["model"]["mixers"][f"{group}_{name}"][group]["_target_"] for group, name in parts)
    assert list(problems(found)) == []


@pytest.mark.parametrize("third", [0, 1, 2])
def test_every_model_of_a_mixer_composes_and_names_what_exists(third):
    """Likewise, each under a name of its own. That model=NAME trains has tests/training/test_recipes.py."""
    names = [Path(choice).name for choice in MODELS[third::3]]
    found = OmegaConf.to_container(composed(*(f"+model@model.mixers.{name}={name}" for name in names)), resolve=True)
    assert all(found["model"]["mixers"][name]["mixers"]["main"]["_target_"] for name in names)
    assert list(problems(found)) == []


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_says_what_it_is(path):
    lines = path.read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert re.match(r"# \S", first), "opens with one line that says what it is"


def test_every_mixer_has_a_model_of_its_name():
    for path in (CONF / "mixer").glob("*.yaml"):
        assert f"/mixer@mixers.main: {path.stem}," in (CONF / "model" / path.name).read_text(), path.stem


@pytest.mark.parametrize(
    "size, millions",
    [("tiny", 0.467), ("20m", 23), ("50m", 51), ("170m", 166), ("340m", 335), ("760m", 729), ("1300m", 1275)],
)
def test_sizes_are_what_they_say(size, millions):
    import torch

    cfg = composed("model=gated_delta", f"size={size}")
    sizes = OmegaConf.to_container(cfg.model, resolve=True)
    with torch.device("meta"):
        model = LanguageModel(LanguageModelConfig(vocab_size=257 if size == "tiny" else 32000, **sizes))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=gated_delta", "mixer@model.mixers.main=softmax"],
        ["model=hybrid", "model.pattern=[recurrent,attention]", "model.mixers.attention.regressor.window=64"],
        ["model=softmax", "features@model.mixers.main.features=identity", "model.mixers.main.num_kv_heads=1"],
        ["model=gated_delta", "decay@model.mixers.main.decay=none", "model.mixers.main.regressor.backend=torch"],
        ["model=wall", "decay@model.mixers.main.decay=channel_rate"],
    ],
    ids=" ".join,
)
def test_mixers_are_swapped_by_override(overrides):
    cfg = composed(*overrides)
    sizes = OmegaConf.to_container(cfg.model, resolve=True)
    assert LanguageModel(LanguageModelConfig(**sizes)).num_parameters() > 0


# what is typed -> what the one error must say; test_mistakes.py has many more, without Hydra and main
MISTAKES = {
    # misspelt keys, wherever they stand
    "model.num_layer=4": "num_layer",
    "model.mixer=softmax": "mixer",
    "experiment=misspelt": "tokenz",
    "seq_length=256": "seq_length",
    "optimizer.learning_rate=0.1": "learning_rate",
    "+model.mixers.main.regressor.windw=4": "model.mixers.main.regressor.windw=4 is not a setting",
    "+trainer.max_step=4": "trainer.max_step=4 is not a setting",
    # wrong choices and types
    "model=gated_dleta": "gated_dleta",
    "size=huge": "huge",
    "model.num_layers=twelve": "num_layers",
    "model.mixers.main.regressor.backend=fla": "backend=fla can't run",
    # impossible settings
    "micro_batch=5": "micro_batch=5 does not divide",
    "model=titans_mlp model.mixers.main.regressor.depth=2.5": "regressor.depth=2.5 must be a whole number",
    "model=titans_mlp model.mixers.main.regressor.expansion=.inf": "regressor.expansion=.inf is not a number",
    "tokens=10": "tokens=10 is less than one step",
    "+model.mixers.main.num_kv_heads=2": "num_kv_heads=2 does not divide num_heads=3",
    "model.pattern=[attention]": "model.pattern names 'attention'",
    "schedule.warmup=2.5": "schedule.warmup=2.5",
    "seq_len=10000000": "seq_len=10000000",
    "data=text_files data.corpus.path=/nowhere/*.txt": "data.corpus.path='/nowhere/*.txt'",
    "data=mqar data.num_pairs=100": "data.num_pairs=100",
    "tokenizer=hugging_face tokenizer.name=/nowhere": "tokenizer.name",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_setting(mistake, train, monkeypatch, tmp_path):
    """Through train.py's own main, before the first step, without a traceback."""
    overrides = mistake.split(" ")
    if mistake == "experiment=misspelt":
        folder = tmp_path / "more" / "experiment"
        folder.mkdir(parents=True)
        (folder / "misspelt.yaml").write_text("# @package _global_\ntokenz: 3\n")
        overrides.append(f"hydra.searchpath=[file://{folder.parent}]")
    for name in ("RUNS", "TTR_CACHE"):
        monkeypatch.setenv(name, train.environment[name])
    said = said_by_main(overrides, monkeypatch)
    assert re.search(re.escape(MISTAKES[mistake]), said), said
    assert "Traceback" not in said
    assert not list(train.runs.glob("*/config.yaml")), "nothing was begun"


def said_by_main(overrides: list[str], monkeypatch) -> str:
    """What train.py prints when it ends with an error."""
    monkeypatch.setattr("sys.argv", ["train.py", *overrides])
    out = io.StringIO()
    GlobalHydra.instance().clear()
    try:
        with redirect_stderr(out), redirect_stdout(out), pytest.raises(SystemExit) as stop:
            entry.main()
    finally:
        GlobalHydra.instance().clear()
    code = stop.value.code
    assert code not in (0, None)
    return out.getvalue() + (code if isinstance(code, str) else "")


def test_only_what_belongs_can_be_built():
    for target in ("os.system", "builtins.eval", "subprocess.run", "transformers.AutoModel"):
        with pytest.raises(ValueError, match="not allowed"):
            build({"_target_": target})
    assert list(chain(problems({"a": [{"_target_": "os.system"}]}))) == [
        "a[0]._target_=os.system is not allowed; a config may name only models.*, data.*, torch.*, lightning.*"
    ]


def test_names_of_before_are_read():
    """Runs and exported models from before the classes moved."""
    for old in ("models.regression.delta.Delta", "models.regression.ttt.TTT", "models.regression.local.Softmax"):
        parts = {"decay": {"_target_": "models.decay.NoDecay"}, "regressor": {"_target_": old, "backend": "auto"}}
        assert list(problems(current({"_target_": "models.mixer.Mixer", **parts}))) == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_torchrun_says_how_many_processes_there_are(strategy, monkeypatch):
    """Anew after each restart, of which each may find another number of nodes."""
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = composed(f"strategy={strategy}").trainer
    assert (alone.devices, alone.num_nodes) == ("auto", 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for nodes in (4, 3):
        monkeypatch.setenv("WORLD_SIZE", str(2 * nodes))
        trainer = composed(f"strategy={strategy}").trainer
        assert (trainer.devices, trainer.num_nodes) == (2, nodes)
        assert composed(f"strategy={strategy}", "trainer.devices=8").trainer.devices == 8
    assert "torchrun has started 6 processes" in batch({"trainer": {"devices": 1, "num_nodes": 1}})[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "x")
    assert batch({}) == ["LOCAL_WORLD_SIZE=x and WORLD_SIZE=6 are not what torchrun sets"]


@pytest.mark.parametrize(("size", "heads"), [("tiny", 3), ("170m", 12), ("340m", 16), ("1300m", 32)])
def test_networks_have_heads_of_at_most_64(size, heads):
    for name in ("titans_mlp", "ttt_mlp"):
        assert composed(f"model={name}", f"size={size}").model.mixers.main.num_heads == heads
