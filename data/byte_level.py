"""Byte-level BPE: the characters that it writes for bytes, and the form in which `transformers` has a tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD = "<eos>", "<pad>"
NEVER = "ÿ"  # the character of the byte 255, which no UTF-8 has (RFC 3629, section 1): its id is free for PAD


def byte_level(model: models.Model) -> Tokenizer:
    rust = Tokenizer(model)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    return rust


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, by byte value (the map of GPT-2).

    Printable Latin-1 stands for itself; the other 68 bytes take the code points from 256 up, in order.
    """
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in itself else next(spare)) for byte in range(256)]


def as_transformers(rust: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    """A copy, which writes no token before or behind a text, where a model has never seen one. names: of the special
    tokens, eos_token=EOS and pad_token=PAD where they are not given.
    """
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer.from_str(json.dumps(json.loads(rust.to_str()) | {"post_processor": None}))
    settings: dict[str, Any] = {"padding_side": "left", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **{"eos_token": EOS, "pad_token": PAD} | names, **settings)
