"""A text that nothing is trained on: all of it is for validation, in the order of its documents, and it is kept in
memory instead of the cache. What evaluates reads it as it reads `data.text.Text`.
"""

from __future__ import annotations

import numpy as np

from data.corpora import Corpus
from data.shards import TokenShards
from data.text import Sequences
from data.tokenizer import Tokenizer


class WholeText:
    """The first `most_tokens` of a corpus and the one behind, which the last of them predicts.

    bytes_per_token: of all documents that were read for it.
    """

    targets_per_token = 1.0

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, most_tokens: int, name: str = "text"):
        self.tokenizer, self.name, self.source = tokenizer, name, corpus.describe()
        self.vocab_size = tokenizer.vocab_size
        ids, offsets, size, num_bytes = [np.empty(0, np.int64)], [0], 0, 0
        for document in corpus:
            ids.append(np.asarray(tokenizer.encode_batch([document.text])[0], np.int64))
            size += len(ids[-1])
            num_bytes += len(document.text.encode("utf-8", errors="replace"))
            if document.last:
                ids.append(np.array([tokenizer.eos], np.int64))
                size += 1
                offsets.append(size)
            if size > most_tokens:
                break
        self.bytes_per_token = num_bytes / max(1, size)
        self.tokens = TokensInMemory(np.concatenate(ids)[: most_tokens + 1], np.array(offsets), num_bytes)

    def prepare(self, num_workers: int = 0) -> None:
        """Nothing is left to prepare."""

    def describe(self) -> list[str]:
        tokens = self.tokens
        return [
            f"{self.source}: {tokens.num_tokens:,} tokens of {tokens.num_documents:,} documents, "
            f"{self.bytes_per_token:.2f} bytes per token"
        ]

    def validation_samples(self, seq_len: int) -> Sequences:
        return Sequences(self.tokens, seq_len, self.name)


class TokensInMemory(TokenShards):
    """Tokens without a folder. offsets: where each document begins, and at last where the last one ends."""

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, num_bytes: int):
        self.split, self.tokens, self.num_tokens, self.num_bytes = "validation", tokens, len(tokens), num_bytes
        self.offsets = offsets[: 1 + int(np.searchsorted(offsets[1:], len(tokens)))]  # those that begin before its end
        self.num_documents = len(self.offsets)

    def __reduce__(self):
        return TokensInMemory, (self.tokens, self.offsets, self.num_bytes)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.tokens[starts[:, None] + np.arange(length)]
