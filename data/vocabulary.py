"""What the ids of a vocabulary stand for, whatever the tokenizer writes for it: for rows of an embedding that another
vocabulary can take over.

Tokenizers write the same text in different ways. Byte-level ones have a character for each byte (byte_level.py), others
write a blank as U+2581 and a single byte as <0x0A>. Here a token is its bytes. A token with a meaning of its own, such
as the end of a document, is its name; of two vocabularies the ends of document are one token, and so is the padding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from data.byte_level import byte_characters
from data.tokenizer import Tokenizer

BLANK = "\u2581"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")

Meaning = bytes | str  # of a token: its text, or the name of its purpose


def meanings(tokenizer: Tokenizer) -> dict[int, Meaning]:
    """Of each id that the tokenizer has."""
    parts = json.loads(tokenizer.to_hugging_face().backend_tokenizer.to_str())
    special = {token["id"]: token["content"] for token in parts["added_tokens"] if token["special"]}
    names = special | {tokenizer.pad: "end" if tokenizer.pad == tokenizer.eos else "padding", tokenizer.eos: "end"}
    kinds = set(_types(parts["decoder"]))
    spelt = _byte_level if "ByteLevel" in kinds else _blanks if kinds & {"Metaspace", "Replace"} else str.encode
    added = {token["id"]: token["content"].encode() for token in parts["added_tokens"]}
    whole = tokenizer.to_hugging_face().get_vocab()
    return {id: names[id] if id in names else added.get(id) or spelt(token) for token, id in whole.items()}


def shared(theirs: Tokenizer, ours: Tokenizer) -> dict[int, int]:
    """Our id: the id of theirs that means the same, for each of ours that has one."""
    by_meaning: dict[Meaning, int] = {}
    for id, meaning in sorted(meanings(theirs).items()):
        by_meaning.setdefault(meaning, id)
    return {id: by_meaning[meaning] for id, meaning in meanings(ours).items() if meaning in by_meaning}


def _types(part: Any) -> Iterator[str]:
    """Of a decoder and all its parts."""
    if isinstance(part, dict):
        yield part.get("type", "")
        for inner in part.get("decoders", []):
            yield from _types(inner)


def _byte_level(token: str) -> bytes:
    """A token with another character than the 256 is as it is written."""
    try:
        return bytes(BYTES[character] for character in token)
    except KeyError:
        return token.encode()


def _blanks(token: str) -> bytes:
    if byte := BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(BLANK, " ").encode()


BYTES = {character: byte for byte, character in enumerate(byte_characters())}
