"""Runs that are finished, without the training: an untrained model, and the files of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from models.build import build
from models.language_model import LanguageModel, LanguageModelConfig
from models.training.checkpoint import WholeFiles
from scripts.evaluating import machine
from tests.test_config import composed

SIZES = ["model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "seq_len=16", "batch_tokens=64"]
STEP = 3
TEXT = [f"{i} times {j} is {i * j}, and {i} and {j} are {i + j}.\n" for i in range(20) for j in range(12)]


def finished(folder: Path, *words: str, tokenizer: Any = None) -> Path:
    """The folder of a run with these settings: config, checkpoint, model/ and result."""
    cfg = composed(*SIZES, *words, "name=run", f"run_dir={folder}", "trainer.devices=1")
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    task = build(config["data"], tokenizer=tokenizer or build(config["tokenizer"]), seq_len=config["seq_len"])
    task.prepare()
    torch.manual_seed(1)
    special = task.tokenizer.special_ids if task.tokenizer else {}
    model = LanguageModel(LanguageModelConfig(vocab_size=task.vocab_size, **special, **config["model"]))
    folder.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    WholeFiles().save_checkpoint({"state_dict": weights}, folder / "checkpoints" / f"step-{STEP:09d}.ckpt")
    model.save_pretrained(folder / "model")
    if task.tokenizer:
        task.tokenizer.save(folder / "model")
    (folder / "result.json").write_text(json.dumps({"tokens": STEP * config["batch_tokens"]}))
    return folder


@pytest.fixture(scope="package")
def runs(tmp_path_factory, cache):
    """runs/text on a folder of texts, and runs/recall."""
    root = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTR_CACHE", str(cache))
        patch.setenv("RUNS", str(root / "runs"))
        patch.setattr(machine, "device_and_dtype", lambda: (torch.device("cpu"), torch.float32))
        (root / "texts").mkdir()
        for i in range(8):
            (root / "texts" / f"{i}.txt").write_text("".join(TEXT[i::8]))
        where = ["data=text_files", f"data.corpus.path={root / 'texts'}", "data.corpus.validation_fraction=0.4"]
        finished(root / "runs" / "text", *where, "validation_tokens=500")
        pairs = ["data=mqar", "data.vocab_size=16", "data.num_pairs=2", "validation_tokens=1600"]
        finished(root / "runs" / "recall", *pairs)
        yield root / "runs"
