"""Several corpora by weight as one language-modelling task: the interface of `data.text.Text`.

The training tokens come from the parts in the proportion of their weights (data/mixing.py says in which order). A part
whose text runs out begins again, which `passes` tells before the run.

Each part is validated on the same tokens whatever the weights are, so that two mixtures can be compared part by part.
The whole is told as the text of the mixture would have it: with shares w_i, nats per token n_i and bytes per token b_i,

    nats per token = sum_i w_i n_i        bits per byte = sum_i w_i n_i / (ln 2  sum_i w_i b_i)
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from data.batch import Batch
from data.mixing import MixedOrder, shares_of
from data.shards import cache_folder
from data.store import fetch
from data.text import Text
from data.tokenizer import Tokenizer, Trainable
from models.build import build


class Source(NamedTuple):
    """A part of a mixture, as validation tells of it. share: of the tokens, all shares are 1 together."""

    name: str
    share: float
    bytes_per_token: float


class Mixture:
    """parts: for each name, the settings of a corpus (those of data=fineweb_edu, say).  weights: for each name a
    positive number; their sum may be any.
    """

    targets_per_token = 1.0
    chance = None
    packs_documents = True

    def __init__(
        self,
        parts: dict[str, dict[str, Any]],
        weights: dict[str, float],
        tokenizer: Tokenizer,
        seq_len: int,
        name: str = "mixture",
    ):
        _check(parts, weights)
        self.seq_len, self.tokenizer, self.name = seq_len, tokenizer, name
        self.shares = dict(zip(parts, shares_of([weights[part] for part in parts]).tolist(), strict=True))
        self.parts = {part: _built(part, node, tokenizer, seq_len) for part, node in parts.items()}
        if isinstance(tokenizer, Trainable) and not tokenizer.trained:
            corpora = [f"{part} {share} {self.parts[part].corpus.fingerprint()}" for part, share in self.shares.items()]
            tokenizer.learnt_from = f"{name} {_hash(*corpora)[:12]}"  # and with it the folders of the parts

    def prepare(self, num_workers: int = 0, verify: bool = False) -> None:
        """As Text.prepare, part by part. A tokenizer that learns does so from all parts, by their weights in bytes."""
        if isinstance(self.tokenizer, Trainable) and not self.tokenizer.trained:
            self._prepare_tokenizer(self.tokenizer)
        for part, text in self.parts.items():
            _named(part, partial(text.prepare, num_workers, verify))

    def prepare_part(self, part: int, parts: int, num_workers: int = 0) -> list[Path]:
        """Part `part` (from 0) of `parts` of every corpus (data/divided.py)."""
        if isinstance(self.tokenizer, Trainable) and not self.tokenizer.trained:
            self._prepare_tokenizer(self.tokenizer)
        each = self.parts.items()
        return [p for name, text in each for p in _named(name, partial(text.prepare_part, part, parts, num_workers))]

    def _prepare_tokenizer(self, tokenizer: Trainable) -> None:
        """From the shards of a part where there are some, else from a folder of its own, else from the texts."""
        fetch(self.folder)
        if (saved := self.folder / "tokenizer").exists():
            return tokenizer.load(saved)
        folder = cache_folder() / f"{self.name}-{_hash(tokenizer.spec())[:12]}.tokenizer"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                print(f"Training the tokenizer ({tokenizer.spec()}) on {', '.join(self.parts)}", flush=True)
                tokenizer.train(self._texts())
                draft = folder.with_name(f"{folder.name}.draft")
                shutil.rmtree(draft, ignore_errors=True)
                tokenizer.save(draft)
                draft.rename(folder)
        tokenizer.load(folder)

    def _texts(self) -> Iterator[str]:
        """The training texts: always from the part that has least for its weight."""
        texts = {name: text.corpus.with_both_splits().texts("train") for name, text in self.parts.items()}
        taken = dict.fromkeys(texts, 0.0)
        while taken:
            name = min(taken, key=lambda name: taken[name])
            text = next(texts[name], None)
            if text is None:
                del taken[name]
                continue
            taken[name] += len(text.encode("utf-8", errors="replace")) / self.shares[name]
            yield text

    @property
    def folders(self) -> list[Path]:
        """Of the shards of each part."""
        return [text.folder for text in self.parts.values()]

    @property
    def folder(self) -> Path:
        """A folder of shards, with the tokenizer of all parts."""
        return self.folders[0]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(Source(name, self.shares[name], text.bytes_per_token) for name, text in self.parts.items())

    @property
    def bytes_per_token(self) -> float:
        return sum(source.share * source.bytes_per_token for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Of the tokens of every part, and of the shares."""
        return _hash(*(f"{name} {self.shares[name]} {text.fingerprint}" for name, text in self.parts.items()))

    @property
    def identity(self) -> dict[str, str]:
        first = next(iter(self.parts.values()))
        return {**first.identity, "data fingerprint": self.fingerprint}

    def describe(self) -> list[str]:
        lines = [f"{self.name}: {', '.join(f'{share:.4g} {name}' for name, share in self.shares.items())}"]
        for name, text in self.parts.items():
            lines += (f"{name}: {line}" for line in text.describe())
        return lines

    def order(self, batch: Batch, seed: int, rank: int = 0, first_step: int = 0, overfit: bool = False) -> MixedOrder:
        sizes = [len(text.train_samples()) for text in self.parts.values()]
        return MixedOrder(sizes, list(self.shares.values()), list(self.parts), batch, seed, rank, first_step, overfit)

    def train_samples(self) -> Joined:
        """Of all parts, one behind the other; `order` says which are taken."""
        return Joined([text.train_samples() for text in self.parts.values()])

    def validation_samples(self, seq_len: int | None = None) -> ConcatDataset:
        return ConcatDataset(self.validation_parts(seq_len))

    def validation_parts(self, seq_len: int | None = None) -> list[Dataset]:
        return [text.validation_samples(seq_len) for text in self.parts.values()]

    def passes(self, batch: Batch) -> list[str]:
        """A line for each part: its share of the run's tokens, and how often its text is read for them."""
        lines = []
        for name, text in self.parts.items():
            line = f"{name}: {share_line(self.shares[name], batch)}"
            if text.prepared:
                sequences = len(text.train_samples())
                passes = self.shares[name] * batch.num_steps * batch.sequences / sequences
                shown = f"{passes:,.1f}" if passes >= 10 else f"{passes:.3g}"
                line += f", {shown} passes over its {sequences * batch.seq_len:,}"
                if passes > 1:
                    last = math.ceil(batch.num_steps / passes)
                    line += f": its text runs out in step {last:,} and begins again in another order"
            lines.append(line)
        return lines


class Joined(ConcatDataset):
    """Samples of several parts, one part behind the other."""

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Several samples at once, as data.text.Sequences has them."""
        asked = np.array(indices)
        parts = np.searchsorted(self.cumulative_sizes, asked, side="right")
        found: dict[str, Tensor] = {}
        for part in np.unique(parts).tolist():
            (rows,) = np.nonzero(parts == part)
            texts: Any = self.datasets[part]
            first = self.cumulative_sizes[part] - len(texts)
            for name, values in texts.__getitems__((asked[rows] - first).tolist()).items():
                found.setdefault(name, values.new_empty(len(asked), *values.shape[1:]))[torch.from_numpy(rows)] = values
        return found


def share_line(share: float, batch: Batch) -> str:
    return f"{100 * share:.4g} % of the tokens, {share * batch.num_steps * batch.tokens:,.0f}"


def together(each: Tensor, sources: Sequence[Source]) -> Tensor:
    """Sums over the parts' validation tokens, [P, *, T] with nats first and then the count, as one [*, T]: each part
    with its share, however many tokens it was validated on.
    """
    shares = each.new_tensor([source.share for source in sources])
    return (each * (shares / each[:, 1].sum(-1)).view(-1, 1, 1)).sum(0)


def by_source(each: Tensor, sources: Sequence[Source]) -> dict[str, float]:
    """The metrics of each part."""
    found = {}
    for source, sums in zip(sources, each, strict=True):
        nats = (sums[0].sum() / sums[1].sum()).item()
        found[f"validation/{source.name}/nats"] = nats
        found[f"validation/{source.name}/bits_per_byte"] = nats / math.log(2) / source.bytes_per_token
    return found


def _check(parts: Any, weights: Any) -> None:
    if not isinstance(parts, dict) or not parts:
        raise ValueError(
            f"data.parts={parts} names no corpus; +data@data.parts.NAME=fineweb_edu adds one, under a name of yours"
        )
    known = weights if isinstance(weights, dict) else {}
    missing, others = [part for part in parts if part not in known], [name for name in known if name not in parts]
    if missing or others:
        mend = f"+data.weights.{missing[0]}=1 sets one" if missing else f"~data.weights.{others[0]} takes one away"
        raise ValueError(
            f"data.weights={weights} must have a number for each of data.parts ({', '.join(parts)}) and for nothing "
            f"else; {mend}"
        )
    for name, weight in weights.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"data.parts.{name} is a part of metrics' names: letters, digits, '_' and '-' are allowed")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise ValueError(
                f"data.weights.{name}={weight} must be a positive number; to leave the part out, take it away from "
                "data.parts too"
            )


def _built(part: str, node: Any, tokenizer: Tokenizer, seq_len: int) -> Text:
    if not isinstance(node, dict) or "_target_" not in node:
        raise ValueError(f"data.parts.{part}={node} is no corpus; +data@data.parts.{part}=fineweb_edu chooses one, say")
    if node["_target_"] == f"{Mixture.__module__}.{Mixture.__name__}":
        raise ValueError(
            f"data.parts.{part} is a mixture, and a part is one corpus; name the corpora of that mixture in data.parts "
            f"instead, each with its share of data.weights.{part}"
        )
    task = _named(part, lambda: build(node, tokenizer=tokenizer, seq_len=seq_len))
    if not isinstance(task, Text):
        raise ValueError(f"data.parts.{part} is {node['_target_']}, and a mixture is of texts: data.text.Text")
    return task


def _named(part: str, made: Callable[[], Any]) -> Any:
    """What is made. A mistake in it is told with the settings as the mixture has them."""
    try:
        return made()
    except ValueError as error:
        said = re.sub(r"\bdata\.(corpus|name|drop_duplicates)\b", rf"data.parts.{part}.\1", str(error))
        raise ValueError(said) from error


def _hash(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
