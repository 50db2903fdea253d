"""A corpus as a language-modelling task: the shards, cut into sequences of L tokens.

Documents lie end to end. Sample i holds tokens [i L, i L + L]: L inputs, and the next token of each as its label.
Sample i + 1 starts with the last label of sample i, so that every token but the first is predicted once.

    input_ids  [L]   x_t
    labels     [L]   x_{t+1}, already shifted; -100 (ignored) where it is the first token of another document, which
               nothing before it can tell
    segments   [L]   the number of x_t's document within the sample, from 0
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.corpora import Corpus
from data.divided import divided, merge, prepare_part
from data.prepare import prepare
from data.shards import TokenShards, check, shard_folder
from data.store import fetch
from data.tokenizer import Tokenizer

IGNORE = -100  # the label that cross-entropy leaves out


class Text:
    """A corpus, a tokenizer and a sequence length.

    name: what the cached folder is called.  corpus: see corpora.py.  drop_duplicates: leave out documents whose text
    has been before.
    """

    targets_per_token = 1.0  # a thousandth less, in truth: nothing predicts the first token of a document
    chance = None  # no answer is right
    packs_documents = True  # rows may have several

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, seq_len: int, name: str = "text", drop_duplicates: bool = False
    ):
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be positive")
        if not name or not set(name.lower()) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-"):
            raise ValueError(f"data.name={name!r} names a folder: letters, digits, '_', '-' and '.' are allowed")
        self.corpus, self.tokenizer, self.seq_len, self.name = corpus, tokenizer, seq_len, name
        self.drop_duplicates = drop_duplicates
        self._splits: dict[str, TokenShards] = {}

    def prepare(self, num_workers: int = 0, verify: bool = False) -> None:
        """Write the token shards and train the tokenizer, where not done yet, by num_workers processes. Safe in every
        process, and again. verify: hash every file of what is there (data/shards.py: check).
        """
        if self._splits and not verify:
            return
        folder = self.folder
        fetch(folder)
        if divided(folder):
            merge(self.corpus, self.tokenizer, folder)
        prepare(self.corpus, self.tokenizer, folder, num_workers=num_workers, drop_duplicates=self.drop_duplicates)
        check(folder, self.tokenizer, everything=verify)
        self._splits = {split: TokenShards(folder, split) for split in ("train", "validation")}

    def prepare_part(self, part: int, parts: int, num_workers: int = 0) -> list[Path]:
        """Part `part` (from 0) of `parts` (data/divided.py). Returns the folder, as the only one."""
        where = self.corpus, self.tokenizer, self.folder
        return [prepare_part(*where, part, parts, num_workers=num_workers, drop_duplicates=self.drop_duplicates)]

    @property
    def folder(self) -> Path:
        """Of the shards, which may be still to be written."""
        return shard_folder(self.name, self.corpus, self.tokenizer, self.drop_duplicates)

    @property
    def folders(self) -> list[Path]:
        """All, of which this has one."""
        return [self.folder]

    @property
    def prepared(self) -> bool:
        return bool(self._splits)

    def _shards(self, split: str) -> TokenShards:
        if not self._splits:
            raise ValueError("the data have not been prepared; call prepare() first")
        return self._splits[split]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """Of the validation split; nats per token / (ln 2 x bytes per token) = bits per byte."""
        validation = self._shards("validation")
        return validation.num_bytes / validation.num_tokens

    @property
    def fingerprint(self) -> str:
        """Equal on two machines if and only if the tokens are."""
        return self._shards("train").meta["fingerprint"]

    @property
    def identity(self) -> dict[str, str]:
        """What must stay for a run to go on."""
        tokenizer = f"{self.tokenizer.spec()}, {self.tokenizer.fingerprint()}"
        return {"data fingerprint": self.fingerprint, "tokenizer": tokenizer}

    def _name(self) -> str:
        edition = self.corpus.edition()
        return f"{self.name} ({edition})" if edition else self.name

    def describe(self) -> list[str]:
        lines = [f"{self._name()}: {self._shards('train').meta['source']}"]
        if left_out := self.corpus.left_out():
            lines.append(f"left out: {left_out}")
        for split in ("train", "validation"):
            s = self._shards(split)
            lines.append(f"{split}: {s.num_documents:,} documents, {s.num_tokens:,} tokens, {s.num_bytes:,} bytes")
        lines.append(
            f"tokenizer {self.tokenizer.spec()}: {self.vocab_size:,} ids, {self.bytes_per_token:.2f} bytes per token"
        )
        if self.tokenizer.loses:
            lines.append(
                f"warning: the tokenizer does not keep {', '.join(self.tokenizer.loses)}; bits per byte count the "
                "bytes of the text as it was, and are too low for it"
            )
        return lines

    def train_samples(self) -> Sequences:
        return Sequences(self._shards("train"), self.seq_len, self.name)

    def validation_samples(self, seq_len: int | None = None) -> Sequences:
        """Another seq_len shows how a model does beyond the length it was trained at."""
        return Sequences(self._shards("validation"), seq_len or self.seq_len, self.name)


class Sequences(Dataset):
    """The samples of one split; see the module's docstring."""

    def __init__(self, shards: TokenShards, seq_len: int, name: str):
        if shards.num_tokens <= seq_len:
            raise ValueError(
                f"seq_len={seq_len} is too long for the {shards.split} split of data={name}, which has "
                f"{shards.num_tokens:,} tokens; at most {shards.num_tokens - 1:,} fit"
            )
        self.shards, self.seq_len = shards, seq_len

    def __len__(self) -> int:
        return (self.shards.num_tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Several samples at once, [B, L] each, which is how a loader asks for a batch."""
        starts = np.array(indices, dtype=np.int64) * self.seq_len
        tokens = self.shards.rows(starts, self.seq_len + 1)
        begins = self.shards.document_starts(starts, self.seq_len + 1)
        labels = tokens[:, 1:].astype(np.int64)
        labels[begins[:, 1:]] = IGNORE
        found = {"input_ids": tokens[:, :-1].astype(np.int64), "labels": labels}
        found["segments"] = begins[:, :-1].cumsum(1, dtype=np.int64)
        return {name: torch.from_numpy(rows) for name, rows in found.items()}
