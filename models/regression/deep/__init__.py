"""Memories that are networks: an MLP with Titans' rule (mlp.py), any optimiser at the end of a mini-batch (batches.py),
LaCT's SwiGLU (lact.py), and test-time training layers (ttt/).
"""

from models.regression.deep.lact import LaCT
from models.regression.deep.mlp import DeepMemory
from models.regression.deep.ttt.layer import TTT

__all__ = ["TTT", "DeepMemory", "LaCT"]
