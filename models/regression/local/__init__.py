"""Local memories: fitted anew for every query, from the pairs that are near it.

Problem.    m_t = argmin_m  sum_{i<=t} w(q_t, k_i) ||v_i - m(k_i)||^2 + penalty ,
            where w falls with the distance of q and k. The weights belong to the query, so there is nothing to keep but
            the pairs themselves, and the state grows with the sequence.
Members.    constant.py        m is a constant near q: softmax attention, other kernels, Forgetting, Hopfield
            wall.py            the same with keys whose channels fade
            deltaformer.py     the same over values that are corrected before they are stored
            sliding_window.py  softmax on the last pairs and on learned ones
            polynomial.py      m is linear or quadratic near q: local linear attention, and Parallax, which learns its
                               slope
            kernel.py          no locality but a penalty: kernel ridge regression (intention)
Tools.      pairs.py           the pairs a call may see, documents and windows, queries block by block
"""

from models.regression.local.constant import Forgetting, Hopfield, Softmax, UnnormalizedSoftmax
from models.regression.local.deltaformer import DeltaFormer
from models.regression.local.kernel import Intention
from models.regression.local.polynomial import LocalPolynomial, Parallax
from models.regression.local.sliding_window import SlidingWindow
from models.regression.local.wall import Wall

__all__ = [
    "DeltaFormer",
    "Forgetting",
    "Hopfield",
    "Intention",
    "LocalPolynomial",
    "Parallax",
    "SlidingWindow",
    "Softmax",
    "UnnormalizedSoftmax",
    "Wall",
]
