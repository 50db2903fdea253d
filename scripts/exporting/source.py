"""What is exported: a trained model, its tokenizer, and what is known of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from models.language_model import LanguageModel
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
    """The model of a run, finished or not, of a checkpoint, or of an exported folder. Raises ValueError."""
    found = weights.open_trained(where)
    said = found.path.with_name(f"{found.path.name.replace('model', 'result', 1)}.json")  # model-N has result-N.json
    result = json.loads(said.read_text()) if found.run and found.path.is_dir() and said.is_file() else None
    return Source(found.model, found.path, found.run, found.config, result)
