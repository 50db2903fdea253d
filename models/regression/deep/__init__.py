"""Memories that are networks: an MLP with Titans' rule (mlp.py), any optimiser at the end of a mini-batch (batches.py),
and LaCT's SwiGLU (lact.py).
"""

from models.regression.deep.lact import LaCT
from models.regression.deep.mlp import DeepMemory

__all__ = ["DeepMemory", "LaCT"]
