"""The weights that a new run begins with: `init_from`, the folder of another run or of an exported model."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from models.language_model import LanguageModel
from models.training.checkpoint import newest_whole


def find(init_from: str) -> Path:
    """An exported model's folder, or a checkpoint where the run is not finished. Raises ValueError where neither is."""
    folder = Path(init_from)
    exported = folder / "model" if (folder / "result.json").exists() else folder
    if (exported / "config.json").exists():
        return exported
    if path := newest_whole(folder / "checkpoints")[0]:
        return path
    raise ValueError(
        f"init_from={init_from} is neither the folder of a run, with checkpoints/ or model/ in it, nor that of an "
        "exported model, with config.json in it"
    )


def load(model: LanguageModel, init_from: str | None, tokenizer: Tokenizer | None = None) -> str:
    """Gives the model those weights, and nothing else of the other run: its optimizer, schedule and data begin anew.
    Returns a line about it, "" for None. Raises ValueError, with the first that differs, where names or shapes are
    others, and where an exported model comes with another vocabulary.
    """
    if init_from is None:
        return ""
    path = find(init_from)
    found: dict[str, Tensor]
    if path.is_dir():
        found = LanguageModel.from_pretrained(path, dtype=torch.float32).state_dict()
    else:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        found = {name.removeprefix("model."): value for name, value in saved.items()}
    here = model.state_dict()
    others = [name for name in (here | found) if _shape(here, name) != _shape(found, name)]
    if others:
        raise ValueError(
            f"init_from={init_from} holds another model: {others[0]} is {_shape(found, others[0])} there and "
            f"{_shape(here, others[0])} here, and {len(others) - 1} more differ. Its model=, size= and tokenizer= have "
            "to be those of this run"
        )
    vocabulary = path / "tokenizer.json"
    if tokenizer is not None and vocabulary.exists():
        theirs = tokenizers.Tokenizer.from_file(str(vocabulary)).get_vocab()
        if theirs != tokenizer.to_hugging_face().get_vocab():
            raise ValueError(
                f"init_from={init_from} was trained on another vocabulary, so that its embedding would mean nothing: "
                f"take its own by tokenizer=hugging_face tokenizer.name={path}"
            )
    model.load_state_dict(found)
    return f"weights   of {path}"


def _shape(weights: dict[str, Tensor], name: str) -> str:
    return " x ".join(map(str, weights[name].shape)) if name in weights else "absent"
