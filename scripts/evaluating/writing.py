"""Text that a model writes, token by token, holding nothing of what was before but the states of its layers: their size
does not grow with the text, but for softmax without a window.

The model's own `generate` keeps all tokens, for beams and penalties. Here a text may go on for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from data.tokenizer import Tokenizer
from models.cache import Cache
from models.language_model import LanguageModel

PIECE = 1024  # tokens of a prompt that are read at once
HELD = 64  # tokens that may be waited with before they are shown

Choice = Callable[[Tensor], int]


def greedy(logits: Tensor) -> int:
    return int(logits.argmax(-1))


def sampled(temperature: float, top_p: float, seed: int, device: torch.device) -> Choice:
    """Draws from softmax(logits / temperature), of the likeliest tokens that together have the probability top_p."""
    generator = torch.Generator(device).manual_seed(seed)
    warpers = [TemperatureLogitsWarper(temperature), *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]

    def choose(logits: Tensor) -> int:
        for warper in warpers:
            logits = warper(None, logits)
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

    return choose


class Writer:
    """Reads and writes one text, in turn. cache: the states after all that was read and written but `unread`."""

    def __init__(self, model: LanguageModel, eos: int | None, choose: Choice, dtype: torch.dtype = torch.float32):
        self.model, self.eos, self.choose, self.dtype = model, eos, choose, dtype
        self.forget()

    def forget(self) -> None:
        """The next token begins another text."""
        self.cache: Cache | None = None
        self.unread: list[int] = []

    def read(self, ids: Iterable[int]) -> None:
        self.unread += ids

    def write(self, num_tokens: int | None = None) -> Iterator[int]:
        """At most so many tokens (None: without end), fewer where the model ends the text, which is then forgotten."""
        assert self.unread, "a text begins with what is read"
        count = 0
        while count != num_tokens:
            token = self.choose(self._logits())
            if token == self.eos:
                self.forget()
                return
            self.unread = [token]
            count += 1
            yield token

    @torch.no_grad()
    def _logits(self) -> Tensor:
        """Of the next token [1, V], in float32."""
        device = self.model.head.weight.device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            for start in range(0, len(self.unread), PIECE):
                ids = torch.tensor([self.unread[start : start + PIECE]], device=device)
                out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                self.cache, seen = out.past_key_values, out.past_key_values.seen
            logits = out.logits[:, -1].float()
        if logits.isnan().any() or logits.isposinf().any():
            raise ValueError(f"the model's output is not finite after {seen} tokens")
        return logits


def shown(tokens: Iterable[int], tokenizer: Tokenizer, before: list[int]) -> Iterator[str]:
    """The text of tokens that follow `before`, as soon as it is certain: a character may be of several tokens.

    Joined it is the text of all of them. (`tokenizers.decoders.DecodeStream` loses bytes that are not UTF-8.)
    """
    before, held, done = before[-16:], [], 0
    for token in tokens:
        held.append(token)
        new = _text(tokenizer, before, held)
        certain = len(new) - new.endswith("\ufffd")  # what may be the beginning of a character
        yield new[done:certain]
        done = certain
        if certain == len(new) or len(held) > HELD:
            yield new[certain:]
            before, held, done = held, [], 0
    yield _text(tokenizer, before, held)[done:]


def _text(tokenizer: Tokenizer, before: list[int], held: list[int]) -> str:
    return tokenizer.decode([*before, *held])[len(tokenizer.decode(before)) :]
