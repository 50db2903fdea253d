"""Decoding: one token's step of a model, which on a GPU is captured once and then replayed."""

from models.decoding.held import Buffers, Held
from models.decoding.step import Step, forget, go_on, places, refusal, uncaptured

__all__ = ["Buffers", "Held", "Step", "forget", "go_on", "places", "refusal", "uncaptured"]
