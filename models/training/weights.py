"""Trained models by their path: a run, one of its checkpoints, the folder of an exported model, or the name of one on
the hub. A new run may begin with their weights (`init_from`), and the scripts that evaluate and generate open them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from conf.settings import leaves
from data.finding import missing
from data.tokenizer import HuggingFace, Tokenizer, Trainable
from data.vocabulary import shared
from models.build import build, current
from models.language_model import LanguageModel, LanguageModelConfig
from models.training import checkpoint, published
from models.training.checkpoint import newest_whole, step_of, what_is_wrong
from models.training.run import difference

# What weights may be given to without another shape, and then mean something else.
OF_IN_PLACE = ("feed_forward_grad_batch", "feed_forward_step_size")
SETTINGS = ("mixers", "pattern", "feed_forward", "tie_embeddings", "norm_eps", *OF_IN_PLACE)

OTHER_KIND = "the model of a made task and no language model: what it came to is in the result.json of its run"
START = re.compile(r"\.decay\.(half_lives|step_range|rate_range)$")  # of gates, before they have learnt anything
ROWS = ("embedding.weight", "head.weight")  # [vocabulary, width]


def find(where: str | Path, setting: str = "init_from=") -> Path:
    """An exported model's folder, or a checkpoint where the run is not finished. Raises ValueError where neither is."""
    folder, said = Path(where).expanduser(), f"{setting}{where}"
    if not folder.exists():
        if published.is_name(str(where)):
            return published.download(str(where), said)
        raise ValueError(f"{said} does not exist{missing(folder)}")
    if folder.is_file():
        if folder.suffix != ".ckpt":
            raise ValueError(f"{said} is a file, and not a checkpoint, which ends in .ckpt")
        if wrong := what_is_wrong(folder):
            raise ValueError(f"{said} is torn: {wrong}")
        return folder
    exported = folder / "model" if (folder / "result.json").exists() else folder
    if (exported / "config.json").exists():
        published.refuse_others(exported / "config.json", said)
        return exported
    if path := newest_whole(folder / "checkpoints")[0]:
        return path
    if (folder / "config.yaml").exists():
        raise ValueError(f"{said} is a run that has no checkpoint yet; it has one after checkpoint_every=")
    if jobs := sorted(path.parent for path in folder.glob("*/config.yaml")):
        raise ValueError(f"{said} holds {len(jobs)} runs; name one of them, such as {jobs[0]}")
    raise ValueError(
        f"{said} is neither the folder of a run, with checkpoints/ or model/ in it, nor that of an exported model, "
        "with config.json in it"
    )


class Trained(NamedTuple):
    """A trained model and what is known of its training.

    model: in float32, on the CPU, in evaluation mode.  path: of the weights.  run, config: the folder of its run and
    that run's config, None where an exported folder stands by itself.  step: of the optimizer, None where no run says.
    """

    model: LanguageModel
    path: Path
    run: Path | None
    config: dict[str, Any] | None
    step: int | None

    def tokenizer(self) -> Tokenizer | None:
        """That of its training, None where that was not on text. Raises ValueError where nothing says which it was, and
        where the one beside it has ids that the model does not know.
        """
        return tokenizer_of(self.path, self.run, self.config, self.model.config.vocab_size)


def tokenizer_of(path: Path, run: Path | None, config: dict[str, Any] | None, known: int) -> Tokenizer | None:
    """As Trained has it, of a model that knows so many ids."""
    beside = [path, *([run / "model"] if run else [])]
    saved = [folder for folder in beside if (folder / "tokenizer.json").exists()]
    if saved:
        found = HuggingFace(str(saved[0]))
        if found.vocab_size > known:
            raise ValueError(
                f"{saved[0]} holds another model's tokenizer, of {found.vocab_size:,} ids: this one knows {known:,}"
            )
        return found
    if config is None:
        raise ValueError(f"{path} has no tokenizer.json, so that it can't read text")
    task = build(config["data"], tokenizer=build(config["tokenizer"]), seq_len=config["seq_len"])
    if not isinstance(task.tokenizer, Trainable):
        return task.tokenizer
    task.prepare()  # its folder holds what was learnt
    return HuggingFace(str(task.folder / "tokenizer"))


def open_trained(where: str | Path) -> Trained:
    """The newest weights of a run, or those of a checkpoint or folder. Raises ValueError, in a sentence."""
    path = find(where, "")
    folder = path.parents[1] if path.is_file() else path.parent
    run = folder if (folder / "config.yaml").exists() else None
    config: Any = current(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))) if run else None
    if path.is_file():
        if config is None:
            raise ValueError(f"{path} stands without its run, which says what its numbers mean: {folder}/config.yaml")
        weights = read(path)
        if unlike := [name for name in weights if name.startswith("decoder.")]:
            raise ValueError(f"{path} has {unlike[0]}, {OTHER_KIND}")
        shape = LanguageModelConfig(vocab_size=len(weights["embedding.weight"]), **config["model"])
        model, step = LanguageModel(shape), step_of(path)
        model.load_state_dict(weights)
        return Trained(model.eval(), path, run, config, step)
    return Trained(_exported(path).eval(), path, run, config, _steps(path, config) if run else None)


def _steps(exported: Path, config: dict[str, Any]) -> int:
    """What the result beside model/ or model-STEPS says."""
    result = json.loads((exported.parent / f"{exported.name.replace('model', 'result')}.json").read_text())
    return result["tokens"] // config["batch_tokens"]


def _exported(folder: Path) -> LanguageModel:
    """Raises ValueError for one that a made task has of its own, which would be taken for a language model."""
    kinds = json.loads((folder / "config.json").read_text()).get("architectures") or [LanguageModel.__name__]
    if kinds != [LanguageModel.__name__]:
        raise ValueError(f"{folder} holds a {kinds[0]}, {OTHER_KIND}")
    return LanguageModel.from_pretrained(folder, dtype=torch.float32)


def read(path: Path) -> dict[str, Tensor]:
    """The weights of an exported folder or of a checkpoint, by the names that LanguageModel has for them."""
    if path.is_dir():
        return _exported(path).state_dict()
    saved = checkpoint.read(path, mmap=True)["state_dict"]
    return {name.removeprefix("model."): value for name, value in saved.items()}


def load(model: LanguageModel, init_from: str | None, tokenizer: Tokenizer | None = None) -> str:
    """Gives the model those weights, and nothing else of the other run: its optimizer, schedule and data begin anew.
    With another vocabulary the rows of the embedding and of the head are taken over for tokens that mean the same
    (data/vocabulary.py); the others stay as they are in the model.

    Returns lines about it, "" for None: other settings of the same shapes are a warning. Raises ValueError, with the
    first that differs, where names or shapes are others, and where the vocabularies have no text in common.
    """
    if init_from is None:
        return ""
    path = find(init_from)
    found, here = read(path), model.state_dict()
    text = tokenizer is not None and all(name in found for name in ROWS)
    theirs, its = _settings_and_tokenizer(path, len(found[ROWS[0]]) if text else 0)
    rows = ""
    if tokenizer is not None and its is not None:
        rows = _take_over_rows(found, here, its, tokenizer, init_from)
    refuse_another(here, found, init_from)
    model.load_state_dict(found)
    said = f"weights   of {path}{rows}"
    return said + "".join(f"\nwarning: init_from={init_from} {each}" for each in _unlike(theirs, model.config))


def refuse_another(
    here: dict[str, Tensor], found: dict[str, Tensor], init_from: str, any_vocabulary: bool = False
) -> None:
    """Raises ValueError for weights with other names or shapes than those here, with the first that differs.
    any_vocabulary: whatever their number of rows, those of the embedding and of the head may do."""
    others = [name for name in (here | found) if _shape(here, name) != _shape(found, name)]
    if any_vocabulary:
        rows = [
            name for name in ROWS if name in here and name in found and here[name].shape[1:] == found[name].shape[1:]
        ]
        others = [name for name in others if name not in rows]
    if others:
        raise ValueError(
            f"init_from={init_from} holds another model: {others[0]} is {_shape(found, others[0])} there and "
            f"{_shape(here, others[0])} here, and {len(others) - 1} more differ. Its model=, size= and tokenizer= have "
            "to be those of this run"
        )


def _take_over_rows(
    found: dict[str, Tensor], here: dict[str, Tensor], its: Tokenizer, ours: Tokenizer, init_from: str
) -> str:
    """Puts rows for our vocabulary in the place of those in `found`, and returns a line about it; nothing and "" where
    the vocabulary is the same.
    """
    choice = f"hugging_face tokenizer.name={its.name}" if isinstance(its, HuggingFace) else its.spec()
    if its.to_hugging_face().get_vocab() == ours.to_hugging_face().get_vocab():
        return ""
    same = {id: other for id, other in shared(its, ours).items() if other < len(found[ROWS[0]])}
    if not same.keys() - {ours.eos, ours.pad}:
        raise ValueError(
            f"init_from={init_from} was trained on a vocabulary that has no text in common with that of this run, so "
            f"that its embedding would mean nothing: take its own by tokenizer={choice}"
        )
    if any(found[name].shape[1:] != here[name].shape[1:] for name in ROWS):
        return ""  # another width, which is told
    for name in ROWS:
        taken = here[name].clone()
        taken[list(same)] = found[name][list(same.values())].to(taken)
        found[name] = taken
    rest = len(here[ROWS[0]]) - len(same)
    return (
        f"\nembedding {len(same):,} rows are those of tokens with the same text, and {rest:,} begin anew (its own "
        f"tokenizer: tokenizer={choice})"
    )


def _settings_and_tokenizer(path: Path, known: int) -> tuple[LanguageModelConfig | None, Tokenizer | None]:
    """Of the model at this path, which knows so many ids: its config, and its tokenizer if `known` is not 0. None
    where nothing says it.
    """
    if path.is_dir():
        theirs = LanguageModelConfig.from_pretrained(path)
        there = known > 0 and (path / "tokenizer.json").exists()
        return theirs, HuggingFace(str(path), add_eos=True) if there else None
    run = path.parents[1]
    if not (run / "config.yaml").exists():
        return None, None
    config: Any = current(OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
    return LanguageModelConfig(**config["model"]), tokenizer_of(path, run, config, known) if known else None


def _settings(config: Any) -> dict[str, Any]:
    return {name: current(getattr(config, name)) for name in SETTINGS}


def _unlike(theirs: LanguageModelConfig | None, ours: Any) -> Iterator[str]:
    """What is to be warned of: settings that say how gates begin, which is nothing where they are trained; and others
    of the same shapes."""
    if theirs is None:
        return
    before, now = _settings(theirs), _settings(ours)
    lines = [line.strip() for line in difference(before, now, "model").splitlines()]
    starts = [line.partition(":")[0] for line in lines if START.search(line.partition(":")[0])]
    set_now = {path: value for path, value in leaves(now, "model") if path in starts and value is not None}
    if set_now:
        shown = ", ".join(f"{path}={value}" for path, value in set_now.items())
        yield f"has gates that are trained: {shown} has no effect"
    if others := [line for line in lines if line.partition(":")[0] not in starts]:
        yield f"was trained with other settings: {'; '.join(others)}"


def _shape(weights: dict[str, Tensor], name: str) -> str:
    return " x ".join(map(str, weights[name].shape)) if name in weights else "absent"
