"""Tokenizers: text to token ids and back.

    Bytes         256 bytes and an end-of-document token. Nothing to train or download, and any text in any script can
                  be told in it; bits per byte follow from the loss without a conversion. The default for the first
                  minute.
    Bpe           byte-level byte-pair encoding (Sennrich et al. 2016; on bytes, Radford et al. 2019) trained on the
                  corpus at hand.
    HuggingFace   the tokenizer of a published model, by hub name or from a local folder.

Every tokenizer has one end-of-document token, `eos`, which `data.shards` appends to each document. It is never produced
by `encode`: text that merely spells "<eos>" is encoded as those characters.

Only `Bpe` has to be trained before it can encode; `data.shards` does that on the training split and keeps the result
beside the shards. Until then it knows its recipe (`spec`) and nothing else, and says so when asked for more.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<eos>"


class Tokenizer(ABC):
    """What every tokenizer answers.

    vocab_size: number of ids, the end-of-document token included.  eos: its id.
    """

    vocab_size: int
    eos: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids per text, without the end-of-document token."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids. Bytes that are not UTF-8 (half a character, say) become U+FFFD; eos is left out."""

    @abstractmethod
    def spec(self) -> str:
        """What makes this tokenizer again, given the corpus. Known before training: caches are found by it."""

    @abstractmethod
    def to_hugging_face(self) -> PreTrainedTokenizerFast:
        """The same map for `transformers`, for exported models. "<eos>" in a text is the token there, as usual."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def fingerprint(self) -> str:
        """A hash of the map from text to ids: equal fingerprints, equal ids."""
        return _hash(self.spec())

    def save(self, folder: str | Path) -> None:
        """Write the files of the `transformers` form to this folder (created where missing)."""
        self.to_hugging_face().save_pretrained(str(folder))


class Trainable(Tokenizer):
    """A tokenizer that learns its vocabulary from text before it can be used."""

    @property
    @abstractmethod
    def trained(self) -> bool: ...

    @abstractmethod
    def train(self, texts: Iterable[str]) -> None: ...

    @abstractmethod
    def load(self, folder: str | Path) -> None:
        """Take the vocabulary that `save` wrote to this folder."""


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8 as ids 0 to 255, and end of document as id 256."""

    vocab_size = 257
    eos = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    def spec(self) -> str:
        return "bytes"

    def to_hugging_face(self) -> PreTrainedTokenizerFast:
        """A byte-level BPE without merges. Its vocabulary is ordered so that the ids are the byte values."""
        vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
        return _as_transformers(_byte_level(models.BPE(vocab=vocabulary, merges=[])))


class Bpe(Trainable):
    """Byte-level BPE of at most `vocab_size` ids, trained on the first `train_bytes` bytes of the training split.

    Training is deterministic: merges go by count, then by id. A small corpus may have fewer pairs to merge than asked
    for; `vocab_size` is what was learnt as soon as that is known.
    """

    def __init__(self, vocab_size: int, train_bytes: int = 2**28):
        if vocab_size < 257:
            raise ValueError(f"tokenizer.vocab_size={vocab_size} is too small; bytes and the end of document take 257")
        if train_bytes < 1:
            raise ValueError(f"tokenizer.train_bytes={train_bytes} must be positive")
        self.max_vocab_size, self.train_bytes = vocab_size, train_bytes
        self._rust: RustTokenizer | None = None

    @property
    def trained(self) -> bool:
        return self._rust is not None

    @property
    def vocab_size(self) -> int:
        return self.rust.get_vocab_size()

    @property
    def eos(self) -> int:
        eos = self.rust.token_to_id(EOS)
        assert eos is not None  # _use has added it
        return eos

    @property
    def rust(self) -> RustTokenizer:
        if self._rust is None:
            raise ValueError("tokenizer=bpe has not been trained yet; the task trains it in prepare(), call that first")
        return self._rust

    def train(self, texts: Iterable[str]) -> None:
        trainer = trainers.BpeTrainer(
            vocab_size=self.max_vocab_size - 1,  # eos is added last: its id is then the highest, as for bytes
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        rust = _byte_level(models.BPE())
        rust.train_from_iterator(_first_bytes(texts, self.train_bytes), trainer)
        self._use(rust)

    def load(self, folder: str | Path) -> None:
        path = Path(folder) / "tokenizer.json"
        try:
            self._use(RustTokenizer.from_file(str(path)))
        except Exception as error:  # the library raises this very class, for a missing file as for a broken one
            raise ValueError(
                f"{path} can't be read as a tokenizer ({error}); delete the folder above it, and it is made again"
            ) from error

    def _use(self, rust: RustTokenizer) -> None:
        rust.add_special_tokens([AddedToken(EOS, special=True)])
        rust.encode_special_tokens = True  # "<eos>" within a text is five characters, not the end of a document
        self._rust = rust

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._rust is not None:
            self._rust.encode_special_tokens = True  # pickling forgets it

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.rust.encode_batch_fast([_utf8(text).decode() for text in texts], add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int64) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self.rust.decode([int(i) for i in ids], skip_special_tokens=True)

    def spec(self) -> str:
        return f"bpe vocab_size={self.max_vocab_size} train_bytes={self.train_bytes}"

    def fingerprint(self) -> str:
        model = json.loads(self.rust.to_str())[
            "model"
        ]  # the rest is written differently once `transformers` has saved it
        return _hash(json.dumps([sorted(model["vocab"].items()), model["merges"], self.eos]))

    def to_hugging_face(self) -> PreTrainedTokenizerFast:
        return _as_transformers(RustTokenizer.from_str(self.rust.to_str()))


class HuggingFace(Tokenizer):
    """The tokenizer of a model on the Hugging Face hub, or of a local folder. Code from the hub is never run.

    `add_eos` names what to do with a tokenizer that has no end-of-sequence token: add one (true) or refuse (false).
    """

    def __init__(self, name: str, add_eos: bool = False):
        from transformers import AutoTokenizer  # several seconds of import, for this class alone

        self.name = str(name)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"tokenizer.name={self.name!r} can't be loaded: it must be a folder with a tokenizer, or a name on the "
                f"hub that is reachable from here or in its cache ({reason[:200]})"
            ) from error
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"tokenizer.name={self.name!r} has no fast tokenizer (tokenizer.json), which is what is supported here"
            )
        if self._tokenizer.eos_token_id is None:
            if not add_eos:
                raise ValueError(
                    f"tokenizer.name={self.name!r} has no end-of-sequence token; tokenizer.add_eos=true adds one"
                )
            self._tokenizer.add_special_tokens({"eos_token": EOS})
        self._tokenizer.backend_tokenizer.encode_special_tokens = True
        self.vocab_size, self.eos = len(self._tokenizer), self._tokenizer.eos_token_id

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.backend_tokenizer.encode_special_tokens = True  # pickling forgets it

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        backend = self._tokenizer.backend_tokenizer
        encoded = backend.encode_batch_fast([_utf8(text).decode() for text in texts], add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int64) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def spec(self) -> str:
        return f"hugging_face {_hash(self._tokenizer.backend_tokenizer.to_str())} eos={self.eos}"

    def to_hugging_face(self) -> PreTrainedTokenizerFast:
        return self._tokenizer


def _byte_level(model: models.Model) -> RustTokenizer:
    rust = RustTokenizer(model)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    return rust


def _as_transformers(rust: RustTokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token=EOS, clean_up_tokenization_spaces=False)


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, by byte value (the map of GPT-2).

    Printable Latin-1 stands for itself; the other 68 bytes take the code points from 256 up, in order.
    """
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in itself else next(spare)) for byte in range(256)]


def _utf8(text: str) -> bytes:
    """UTF-8, with '?' for lone surrogates: JSON may hold them, UTF-8 can't."""
    return text.encode("utf-8", errors="replace")


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        if seen >= limit:
            return
        seen += len(_utf8(text))
        yield _utf8(text).decode()


def _hash(text: str) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]
