"""Test-time training as published: memories with a residual and a layer norm, in mini-batches (layer.py)."""

from models.regression.deep.ttt.layer import TTT

__all__ = ["TTT"]
