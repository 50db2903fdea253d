"""First-order memories: a matrix, and one step for every pair.

Problem.    m(k) = k M. Least squares over all pairs would need the inverse of sum_i k_i^T k_i. A first-order memory
            never forms it. It takes one step along the gradient of the newest pair's loss 1/2 ||v_t - k_t M||^2,
                M_t = a_t M_{t-1} + b_t k_t^T (v_t - k_t M_ref) ,      o_t = q_t M_t ,
            and members differ in where the error is taken (M_ref) and how long the step is (b_t).
Members.    linear.py          M_ref = 0: linear attention, RetNet, GLA, Mamba-2
            delta.py           M_ref = a_t M_{t-1}: DeltaNet, Gated DeltaNet, Kimi Delta Attention; with M_ref = M_{t-1}
                               leaky LMS; with the exact step EFLA
            erasing.py         what is erased, written and read taken apart: Gated DeltaNet-2, Comba, RWKV-7
            delta_product.py   several such steps for one token
            longhorn.py        the implicit step: b_t / (1 + b_t |k_t|^2)
            preconditioned.py  a step size for each channel, from the diagonal of the inverse, exact or squashed
            momentum.py        steps that go on: Titans' rule for a matrix
            omega.py           the same, each step fitting the last few pairs
Tools.      delta_chunks.py    the delta rule's chunks with their gradient
            references.py      where the tokens of momentum and omega take their gradients
            coefficients.py    of what their chunks read, refer to and carry on
            mixtures.py        those chunks, from the coefficients, with their gradient
"""

from models.regression.linear.delta import Delta
from models.regression.linear.delta_product import DeltaProduct
from models.regression.linear.erasing import Comba, GatedDelta2, Rwkv7
from models.regression.linear.linear import Linear
from models.regression.linear.longhorn import Longhorn
from models.regression.linear.momentum import Momentum
from models.regression.linear.omega import Omega
from models.regression.linear.preconditioned import PreconditionedDelta, SquashedDelta

__all__ = [
    "Comba",
    "Delta",
    "DeltaProduct",
    "GatedDelta2",
    "Linear",
    "Longhorn",
    "Momentum",
    "Omega",
    "PreconditionedDelta",
    "Rwkv7",
    "SquashedDelta",
]
