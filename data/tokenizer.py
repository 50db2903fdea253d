"""Tokenizers: text to token ids and back.

    Bytes         256 bytes and an end-of-document token. Nothing to train or download, and any text in any script can
                  be told in it; bits per byte follow from the loss without a conversion. The default for the first
                  minute.
    Bpe           byte-level byte-pair encoding (Sennrich et al. 2016; on bytes, Radford et al. 2019) trained on the
                  corpus at hand.
    HuggingFace   the tokenizer of a published model, by hub name or from a local folder.

Every tokenizer has one end-of-document token, `eos`, which `data.shards` appends to each document. It is never produced
by `encode`: text that merely spells "<eos>" is encoded as those characters. Nor is anything else produced that the text
does not say: no token before or behind it, no padding, and no end before its own.

Only `Bpe` has to be trained before it can encode; `data.shards` does that on the training split and keeps the result
beside the shards. Until then it knows its recipe (`spec`) and nothing else, and says so when asked for more.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from data.byte_level import EOS, NEVER, PAD, as_transformers, byte_characters, byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What a normalizer of a published tokenizer may leave out, each in a text that shows it.
PROBES = {
    "capitals": "Aa",
    "accents": "é",
    "line ends and runs of blanks": "a  b\n\n\tc",
    "blanks at the end": "a ",
    "forms that NFKC unites": "Ａ①ﬁ",
    "scripts": "文 ж 🙂",
}
RARE = "é文🙂𓀀\U0010fffd"  # a vocabulary that does not fall back to bytes lacks one of these


class Tokenizer(ABC):
    """What every tokenizer answers.

    vocab_size: the largest id + 1, the end-of-document token included.  eos: its id.  pad: the id of what fills up the
    shorter rows of a batch, another than eos where there is one (a collator that leaves padding out of the loss would
    leave out eos too, and a model that is trained on would never learn to stop).
    """

    vocab_size: int
    eos: int
    pad: int
    loses: tuple[str, ...] = ()  # what of a text does not come back from its ids

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
        """The same map for `transformers`, for exported models; it pads on the left, where `generate` needs it. "<eos>"
        in a text is the token there, as usual.
        """

    @property
    def special_ids(self) -> dict[str, int]:
        """Of the config of a model, by which `generate` stops and pads."""
        return {"eos_token_id": self.eos, "pad_token_id": self.pad}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def fingerprint(self) -> str:
        """A hash of the map from text to ids: equal fingerprints, equal ids."""
        return _hash(self.spec())

    def save(self, folder: str | Path) -> None:
        """Write the files of the `transformers` form to this folder (created where missing)."""
        self.to_hugging_face().save_pretrained(str(folder))


class Trainable(Tokenizer):
    """A tokenizer that learns its vocabulary from text before it can be used.

    learnt_from: the text, where it is not that of the corpus whose shards are written; a part of the `spec`.
    """

    learnt_from = ""

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
    pad = 255  # NEVER

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    def spec(self) -> str:
        return "bytes"

    def to_hugging_face(self) -> PreTrainedTokenizerFast:
        """A byte-level BPE without merges. Its vocabulary is ordered so that the ids are the byte values."""
        vocabulary = {character: byte for byte, character in enumerate([*byte_characters()[: self.pad], PAD])}
        return as_transformers(byte_level(models.BPE(vocab=vocabulary, merges=[])))


class Fast(Tokenizer):
    """What tokenizers of the library `tokenizers` share."""

    _rust: RustTokenizer | None = None

    @property
    def rust(self) -> RustTokenizer:
        if self._rust is None:
            raise ValueError("tokenizer=bpe has not been trained yet; the task trains it in prepare(), call that first")
        return self._rust

    def _id(self, token: str) -> int:
        id = self.rust.token_to_id(token)
        assert id is not None, token  # all special tokens are added
        return id

    def _set(self, rust: RustTokenizer | None) -> None:
        if rust is not None:
            rust.encode_special_tokens = True  # "<eos>" within a text is five characters, not the end of a document
        self._rust = rust

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set(self._rust)  # pickling forgets what was set

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.rust.encode_batch_fast([_utf8(text).decode() for text in texts], add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int64) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self.rust.decode([int(i) for i in ids], skip_special_tokens=True)


class Bpe(Fast, Trainable):
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

    @property
    def trained(self) -> bool:
        return self._rust is not None

    @property
    def vocab_size(self) -> int:
        return self.rust.get_vocab_size()

    @property
    def eos(self) -> int:
        return self._id(EOS)

    @property
    def pad(self) -> int:
        return self._id(PAD)

    def train(self, texts: Iterable[str]) -> None:
        trainer = trainers.BpeTrainer(
            vocab_size=self.max_vocab_size - 1,  # eos is added last: its id is then the highest, as for bytes
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        rust = byte_level(models.BPE())
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
        parts = json.loads(rust.to_str())
        vocabulary = parts["model"]["vocab"]
        if NEVER in vocabulary:
            vocabulary[PAD] = vocabulary.pop(NEVER)
        rust = RustTokenizer.from_str(json.dumps(parts))
        rust.add_special_tokens([AddedToken(PAD, special=True), AddedToken(EOS, special=True)])
        self._set(rust)

    def spec(self) -> str:
        on = f" on {self.learnt_from}" if self.learnt_from else ""
        return f"bpe vocab_size={self.max_vocab_size} train_bytes={self.train_bytes}{on}"

    def fingerprint(self) -> str:
        # the rest is written differently once `transformers` has saved it
        model = json.loads(self.rust.to_str())["model"]
        vocabulary = {NEVER if token == PAD else token: id for token, id in model["vocab"].items()}
        return _hash(json.dumps([sorted(vocabulary.items()), model["merges"], self.eos]))

    def to_hugging_face(self) -> PreTrainedTokenizerFast:
        return as_transformers(self.rust)


class HuggingFace(Fast):
    """The tokenizer of a model on the Hugging Face hub, or of a local folder. Code from the hub is never run.

    Of its file the map from text to ids is kept, not what else may stand there for another use: truncation, padding,
    tokens that are put before or behind a text, the longest text, a chat's template.

    `add_eos` names what to do with a tokenizer that has no end-of-sequence token: add one (true) or refuse (false).
    """

    def __init__(self, name: str, add_eos: bool = False):
        from transformers import PreTrainedTokenizerFast  # several seconds of import, for this class alone

        self.name = str(name)
        try:
            # not AutoTokenizer, which builds some kinds anew, and otherwise than their file says
            theirs: Any = PreTrainedTokenizerFast.from_pretrained(self.name)
        except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two of JSON that is no dictionary
            reason = " ".join(str(error).split())
            raise ValueError(
                f"tokenizer.name={self.name!r} can't be loaded: it must be a folder with a tokenizer, or a name on the "
                f"hub that is reachable from here or in its cache ({reason[:200]})"
            ) from error
        if not theirs.is_fast:
            raise ValueError(
                f"tokenizer.name={self.name!r} has no fast tokenizer (tokenizer.json), which is what is supported here"
            )
        if theirs.eos_token_id is None:
            if not add_eos:
                raise ValueError(
                    f"tokenizer.name={self.name!r} has no end-of-sequence token; tokenizer.add_eos=true adds one"
                )
            theirs.add_special_tokens({"eos_token": EOS})
        self.eos = theirs.eos_token_id
        self._use(theirs.backend_tokenizer, theirs.eos_token)
        self.vocab_size = max(self.rust.get_vocab(with_added_tokens=True).values()) + 1  # ids may have holes
        self._names = {name: str(token) for name, token in theirs.special_tokens_map.items() if isinstance(token, str)}
        # bos: no document here has it
        pads = (token for token in (theirs.pad_token, theirs.bos_token) if token not in (None, theirs.eos_token))
        self._names["pad_token"] = next(pads, theirs.eos_token)
        self.pad = self._id(self._names["pad_token"])
        # some put a blank before every text
        came_back = {what: self.decode(self.encode(text)).removeprefix(" ") for what, text in PROBES.items()}
        self.loses = tuple(what for what, text in PROBES.items() if came_back[what] != text)

    def _use(self, rust: RustTokenizer, eos: str) -> None:
        rust.no_truncation()
        rust.no_padding()
        if getattr(rust.model, "dropout", None):
            rust.model.dropout = None  # of merges: encodings would be random
        self._set(rust)
        if self.eos in self.encode(RARE):
            raise ValueError(
                f"tokenizer.name={self.name!r} has its end-of-sequence token {eos!r} for unknown characters too; "
                "choose one whose unk_token is another"
            )
        if not self._spelt(eos):
            return
        # a cut behind the first character of what spells it: the model then never sees the whole
        cut = pre_tokenizers.Split(Regex(f"{re.escape(eos[0])}(?={re.escape(eos[1:])})"), "isolated")
        theirs = rust.pre_tokenizer
        rust.pre_tokenizer = cut if theirs is None else pre_tokenizers.Sequence([theirs, cut])
        if self._spelt(eos):
            raise ValueError(
                f"tokenizer.name={self.name!r} makes its end-of-sequence token of a text with {eos!r} in it; "
                "choose one that tells the two apart"
            )

    def _spelt(self, eos: str) -> bool:
        return any(self.eos in self.encode(text) for text in (eos, f"a{eos}a", f"a {eos} a", eos + eos))

    def spec(self) -> str:
        return f"hugging_face {_hash(self.rust.to_str())} eos={self.eos}"

    def to_hugging_face(self) -> PreTrainedTokenizerFast:
        return as_transformers(self.rust, **self._names)


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
