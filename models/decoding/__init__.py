"""Decoding: one token's step of a model, and a prompt's pieces, which on a GPU are captured once and then replayed."""

from models.decoding.held import Buffers, Held
from models.decoding.step import Step, forget, go_on, places, refusal, refusal_of_pieces, uncaptured

__all__ = [
    "Buffers",
    "Held",
    "Step",
    "forget",
    "go_on",
    "places",
    "refusal",
    "refusal_of_pieces",
    "uncaptured",
]
