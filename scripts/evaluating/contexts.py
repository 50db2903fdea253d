"""What a model is evaluated on: which data, and which of their tokens at which length.

Every length predicts the same tokens, once each, so that only what can be seen before them differs. For a text whose
longest sequences have M tokens, some of those are chosen, evenly spaced, and a length of M / m cuts each into m. (With
one length these are the sequences that a run validates on.) Recall is drawn anew at each length: as many sequences.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import ConcatDataset, Dataset, Subset

from conf import schema, settings
from conf.command import sentence
from data.files import TextFiles
from data.mixture import Mixture
from data.tokenizer import Bytes
from data.whole_text import WholeText
from models.build import build, near
from models.training.weights import Trained

CONF = Path(__file__).resolve().parents[2] / "conf"
OWN = "own"  # the run's data as a choice of data=


def data_node(config: dict[str, Any] | None, words: list[str]) -> dict[str, Any]:
    """The data of a run, changed by words such as data=wikitext or data.num_pairs=16, as train.py reads them. Raises
    ValueError for other words, and where there is no run and none says which data.
    """
    for word in words:
        if not word.lstrip("+~").startswith(("data=", "data.")):
            raise ValueError(f"{word} changes the model or its training; only data= and data.*= may be set here")
    chosen = any(word.startswith("data=") for word in words)
    if config is None and not chosen:
        raise ValueError("an exported model by itself has no data; say which by data=... or --text PATH")
    schema.register()
    if config is not None:
        ConfigStore.instance().store(group="data", name=OWN, node=config["data"])
    if not chosen:
        unknown(words, config)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*([] if chosen else [f"data={OWN}"]), *words, "name=evaluate", "run_dir=none"])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(sentence(error, words)) from error
    settings.whole_numbers(cfg)
    if absent := sorted(OmegaConf.missing_keys(cfg.data)):
        raise ValueError(f"to be set: {', '.join(f'{name}=...' for name in absent)}")
    node: Any = OmegaConf.to_container(cfg.data, resolve=True)
    if found := list(settings.numbers({"data": node}, {})):
        raise ValueError("\n       ".join(found))
    return node


def unknown(words: list[str], config: Any) -> None:
    """Raises ValueError for a word that changes what the run's data have not."""
    paths = [path for path, _ in settings.leaves({"data": config["data"]})]
    for word in words:
        name, _, value = word.partition("=")
        if not name.startswith("+") and not any(f"{path}.".startswith(f"{name.lstrip('~')}.") for path in paths):
            meant = near(name, paths)
            hint = f"did you mean {meant}={value}?" if meant else f"they have {', '.join(paths)}"
            raise ValueError(f"{word} is not a setting of the run's data; {hint}")


def task_of(trained: Trained, node: dict[str, Any], seq_len: int) -> Any:
    """The data, prepared, in the tokens of the model. A tokenizer that was trained on other data is taken as it is
    saved: its recipe would train another one on these.
    """
    same = trained.config is not None and node == trained.config["data"]
    task = build(node, tokenizer=Bytes(), seq_len=seq_len)
    if task.tokenizer is not None:
        recipe = trained.config["tokenizer"] if trained.config else {}
        anywhere = "data.tokenizer.Bytes" in str(recipe.get("_target_"))
        tokenizer = build(recipe) if same or anywhere else trained.tokenizer()
        if tokenizer is None:
            raise ValueError(f"{trained.path} was not trained on text, and data={task.name} is text")
        task = build(node, tokenizer=tokenizer, seq_len=seq_len)
    task.prepare()
    return fitting(trained, task)


def text_of(trained: Trained, path: list[str], most_tokens: int) -> Any:
    """Files, all of whose text is evaluated on, up to so many tokens."""
    tokenizer = trained.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{trained.path} was not trained on text, and --text={' '.join(path)} is text")
    try:
        return fitting(trained, WholeText(TextFiles(path), tokenizer, most_tokens, path[0]))
    except ValueError as error:
        raise ValueError(str(error).replace("data.corpus.path", "--text")) from error


def fitting(trained: Trained, task: Any) -> Any:
    """The task. Raises ValueError where it has tokens that the model does not know."""
    known = trained.model.config.vocab_size
    if task.vocab_size > known:
        raise ValueError(f"the data have {task.vocab_size:,} different tokens, and {trained.path} knows {known:,}")
    return task


def lengths(seq_len: int, times: list[int]) -> list[int]:
    """In tokens, rising. Raises ValueError where one does not divide the longest."""
    for n in times:
        if n < 1 or max(times) % n:
            raise ValueError(f"--times: {n} is not a divisor of {max(times)}, the longest; take 1 2 4 8, say")
    return sorted({seq_len * n for n in times})


def sequences(task: Any, length: int, longest: int, num_tokens: int) -> tuple[Dataset, int]:
    """Those of this length, and how many tokens belong together: the longest's, or one's own where each is drawn by
    itself. num_tokens: of all, rounded up to the longest, and at most what there is; of what is drawn, at the length of
    training. Those of a mixture are of its parts, by their shares. See the module's docstring.
    """
    if isinstance(task, Mixture):
        parts = ((task.parts[name], math.ceil(share * num_tokens)) for name, share in task.shares.items())
        each = [sequences(part, length, longest, count) for part, count in parts]
        return ConcatDataset([samples for samples, _ in each]), each[0][1]
    try:
        whole, samples = task.validation_samples(longest), task.validation_samples(length)
    except ValueError as error:
        raise ValueError(f"--times: for sequences of {longest:,} tokens {error}") from error
    drawn = task.tokenizer is None
    count = min(-(-num_tokens // (task.seq_len if drawn else longest)), len(whole))
    chosen = [i * len(whole) // count for i in range(count)]
    together = length if drawn else longest
    pieces = together // length
    return Subset(samples, [i * pieces + j for i in chosen for j in range(pieces)]), together
