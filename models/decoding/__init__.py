"""Decoding: one token's step of a model, which on a GPU is captured once and then replayed."""

from models.decoding.held import Held
from models.decoding.step import Step, forget, go_on, refusal, uncaptured

__all__ = ["Held", "Step", "forget", "go_on", "refusal", "uncaptured"]
