"""Takes a published model over: a dense Qwen3 or Qwen3-Next becomes an exported model of this repository.

    python scripts/import_model.py Qwen/Qwen3-0.6B-Base --folder imported     # a name on the hub, or a folder

All that takes an exported model takes the folder. Its conf/ has the settings with which train.py goes on from it:

    python train.py "hydra.searchpath=[file:///FOLDER/conf]" experiment=imported optimizer.lr=1e-5

docs/exporting.md has the details.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from data.tokenizer import HuggingFace, Tokenizer
from models.language_model import LanguageModel
from models.training.summary import quiet, say
from scripts.exporting.qwen_import import from_qwen, refusal

MODEL = "# {name}, from transformers' {architecture}.\n"
EXPERIMENT = """# @package _global_
# To go on from {name}: its sizes and weights{tokenizer}.
defaults:
  - override /model: imported
"""


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that transformers opens, or a name on the hub")
    parser.add_argument("--folder", type=Path, required=True, help="where to; it must not be there")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    given = arguments(words)
    quiet()
    try:
        for line in take_over(given.model, given.folder):
            say(line)
    except ValueError as error:
        sys.exit(f"error: {error}")


def take_over(name: str, folder: Path) -> list[str]:
    """Writes the folder, whole or not at all, and returns what there is to say. Raises ValueError where it can't be."""
    if folder.exists():
        raise ValueError(f"--folder {folder} is there already; name another, or remove it")
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"{name} can't be loaded: it must be a folder with a config.json, or a name on the hub that is reachable "
            f"from here or in its cache ({' '.join(str(error).split())[:200]})"
        ) from error
    if (reason := refusal(config)) is not None:
        raise ValueError(f"{name} has {reason}")
    tokenizer = _tokenizer(name)
    theirs = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    ours = from_qwen(theirs, tokenizer.vocab_size if tokenizer else None)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    ours.save_pretrained(draft)
    if tokenizer is not None:
        tokenizer.save(draft)
    write_settings(ours, tokenizer is not None, draft / "conf", folder.absolute(), name, type(theirs).__name__)
    draft.rename(folder)
    size = sum(parameter.numel() for parameter in ours.parameters())
    said = [f"imported  {folder}: {size:,} parameters, of {type(theirs).__name__}"]
    if (left_out := config.vocab_size - ours.config.vocab_size) > 0:
        said.append(f"          without {left_out:,} rows of its embedding that its tokenizer has no ids for")
    searched = f'"hydra.searchpath=[file://{folder.absolute()}/conf]"'
    return [*said, f"go on by  python train.py {searched} experiment=imported optimizer.lr=1e-5"]


def _tokenizer(name: str) -> Tokenizer | None:
    """None for a folder without one."""
    folder = Path(name)
    return None if folder.is_dir() and not (folder / "tokenizer.json").is_file() else HuggingFace(name)


def write_settings(
    model: LanguageModel, has_tokenizer: bool, conf: Path, folder: Path, name: str, architecture: str
) -> None:
    """model/imported.yaml, the mixers, and experiment/imported.yaml, which takes them, the sizes and the weights."""
    c = model.config
    heads = c.mixers[c.pattern[-1]]["num_heads"]
    kept = ("mixers", "pattern", "feed_forward_size", "tie_embeddings", "norm_eps")
    body: dict[str, Any] = {"defaults": ["base", "_self_"]} | {key: getattr(c, key) for key in kept}
    sizes = {"hidden_size": c.hidden_size, "num_layers": c.num_layers, "num_heads": heads}
    settings: dict[str, Any] = {"model": sizes, "init_from": str(folder)}
    head = EXPERIMENT.format(name=name, tokenizer=", and its tokenizer" if has_tokenizer else "")
    if has_tokenizer:
        head += "  - override /tokenizer: hugging_face\n"
        settings["tokenizer"] = {"name": str(folder)}
    texts = {
        "model": MODEL.format(name=name, architecture=architecture) + OmegaConf.to_yaml(body),
        "experiment": head + OmegaConf.to_yaml(settings),
    }
    for group, text in texts.items():
        (conf / group).mkdir(parents=True)
        (conf / group / "imported.yaml").write_text(text)


if __name__ == "__main__":
    main()
