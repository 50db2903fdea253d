"""A model's loss on sequences of any length, position by position, in memory that does not grow with the length but by
the states of its layers.

A long sequence goes through the model in pieces. Each piece goes on from the states that the one before has left, which
is the same as one pass over the whole: every mixer here gives the same outputs for any split into calls.

Shapes: B batch, T tokens, M tokens of the longest sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from data.module import collate
from models.cache import Cache
from models.language_model import LanguageModel
from models.loss import IGNORED, score


class Samples(Protocol):
    """What data/text.py and data/synthetic.py make: input_ids, labels and segments [T] of each sequence."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class Sums(NamedTuple):
    """Over all sequences, at each index: of -log p(target) in nats, of targets, of targets that were the likeliest
    token. float64 [3, T], place [3, M].

    position: the index is the token's place in its sequence.  context: how many tokens of its document it can see
    before itself, which is less where a sequence packs several documents.  place: its place in the longest sequence,
    which was cut into those that the model has seen: at each index there are the same tokens, whatever the length.
    """

    position: Tensor
    context: Tensor
    place: Tensor


@torch.no_grad()
def in_pieces(
    model: LanguageModel, input_ids: Tensor, targets: Tensor, segments: Tensor | None, piece: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """-log p(target) [B, piece] and the likeliest token [B, piece] of one piece after another."""
    cache = None
    for start in range(0, input_ids.shape[1], piece):
        part = slice(start, start + piece)
        ids, labels = input_ids[:, part], targets[:, part]
        hidden, states = model.hidden(ids, None if segments is None else segments[:, part], cache)
        cache = Cache(states, start + ids.shape[1])
        nats, likeliest = score(hidden.flatten(0, 1), model.head.weight, labels.flatten())
        yield nats.view_as(labels), likeliest.view_as(labels)


def visible(segments: Tensor | None, like: Tensor) -> Tensor:
    """How many tokens of its own document each token of a sequence [B, T] has before it."""
    place = torch.arange(like.shape[1], device=like.device).expand_as(like)
    if segments is None:
        return place
    begins = torch.zeros_like(place)
    begins[:, 1:] = place[:, 1:] * (segments[:, 1:] != segments[:, :-1])
    return place - begins.cummax(1).values


def sums(
    model: LanguageModel,
    samples: Samples,
    length: int,
    longest: int,
    tokens_at_once: int,
    dtype: torch.dtype = torch.float32,
) -> Sums:
    """Of these sequences of `length` tokens, of which longest / length follow each other. tokens_at_once: as many
    sequences are in memory as have that many tokens, but at least one, and of a longer one so many tokens at a time.
    dtype: of the products (bfloat16: by autocast).
    """
    device = model.head.weight.device
    rows, piece = max(1, tokens_at_once // length), min(length, tokens_at_once)
    found = Sums(*(torch.zeros(3, size, dtype=torch.float64, device=device) for size in (length, length, longest)))
    for first in range(0, len(samples), rows):
        numbers = range(first, min(first + rows, len(samples)))
        batch: dict[str, Any] = {name: _to(x, device) for name, x in collate([samples[i] for i in numbers]).items()}
        ids, targets, segments = batch["input_ids"], batch["labels"], batch["segments"]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            pieces = list(in_pieces(model, ids, targets, segments, piece))
        nats, likeliest = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
        kept = targets != IGNORED
        each = torch.stack([nats.double(), kept.double(), ((likeliest == targets) & kept).double()])
        position = visible(None, ids)
        begins = torch.tensor([i * length % longest for i in numbers], device=device).unsqueeze(1)
        for total, index in zip(found, (position, visible(segments, ids), begins + position), strict=True):
            total.index_add_(1, index.flatten(), each.flatten(1))
    return Sums(*(total.cpu() for total in found))


def _to(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)
