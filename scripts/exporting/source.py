"""What is exported: a trained model, its tokenizer, and what is known of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from models.build import current
from models.language_model import LanguageModel, LanguageModelConfig
from models.training import weights


class Source(NamedTuple):
    """model: in float32, on the CPU.  path: of its weights.  run, config, result: the run's folder, config.yaml and
    result.json, None where there is none.
    """

    model: LanguageModel
    path: Path
    run: Path | None
    config: dict[str, Any] | None
    result: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """Of the run, or of the exported model that stands by itself."""
        return self.run or self.path

    def save_tokenizer(self, folder: Path) -> bool:
        """Puts the tokenizer's files there. Whether there are any: a task of recall has none."""
        homes = [self.path, self.folder / "model"]
        found = next((home for home in homes if (home / "tokenizer.json").is_file()), None)
        for path in found.glob("*token*.json") if found else ():
            (folder / path.name).write_bytes(path.read_bytes())
        return found is not None


def opened(where: str) -> Source:
    """The model of a run, finished or not, or of an exported folder. Raises ValueError, in a sentence."""
    path = weights.find(where)
    folder = path.parent if path.is_dir() else path.parents[1]
    run = folder if (folder / "config.yaml").is_file() else None
    config: Any = current(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))) if run else None
    said = folder / path.name.replace("model", "result", 1)
    said = said.with_name(f"{said.name}.json")
    result = json.loads(said.read_text()) if run and path.is_dir() and said.is_file() else None
    if path.is_dir():
        model = LanguageModel.from_pretrained(path, dtype=torch.float32)
    else:
        assert config is not None
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        found = {name.removeprefix("model."): value for name, value in saved.items()}
        model = LanguageModel(LanguageModelConfig(vocab_size=len(found["embedding.weight"]), **config["model"]))
        model.load_state_dict(found)
    return Source(model.eval(), path, run, config, result)
