"""Token mixers: the layers that let tokens see each other.

    layer.py             Layer and State: what every mixer is to its block
    mixer.py             Mixer, the shell: projections, short convolution, norms, gates around one regressor
    memory_attention.py  MemoryAsGate and MemoryAsLayer: a memory beside attention, and below it
    memory_context.py    MemoryAsContext: a memory that writes into attention's context
    published.py         PublishedReadOut and PublishedMixer: Mixer with the shells of published layers
    lact.py              PublishedLaCT: attention in a window beside a network with heads of its own
    mosaic.py            MemoryMosaic: attention whose keys average the past and whose values peek at the next token

What a mixer computes with its queries, keys and values is the business of models/regression.
"""

from models.mixers.lact import PublishedLaCT
from models.mixers.layer import State
from models.mixers.memory_attention import MemoryAsGate, MemoryAsLayer
from models.mixers.memory_context import MemoryAsContext
from models.mixers.mixer import Mixer
from models.mixers.mosaic import MemoryMosaic
from models.mixers.published import PublishedMixer, PublishedReadOut

__all__ = [
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryMosaic",
    "Mixer",
    "PublishedLaCT",
    "PublishedMixer",
    "PublishedReadOut",
    "State",
]
