"""Second-order memories: the best matrix for all pairs so far, at every token.

Problem.    S_t = argmin_S  sum_{i<=t} gamma_i^(t) b_i ||v_i - k_i S||^2 + sum_j Lambda_j ||S_j||^2 .
Solution.   S_t = (H_t + Lambda)^{-1} G_t , with the moments H_t = sum gamma b k^T k and G_t = sum gamma b k^T v. They
            are decayed sums, as cheap as linear attention; the solve is what costs.
Members.    least_squares.py   LeastSquares: mesa, gated Kalman and Nystrom are presets of it
            recursive.py       its forms with a ridge that fades: the inverse kept up to date (RLS)
Tools.      moments.py         H and G, and what a call hands on of them
            layout.py          a call in chunks: what comes before and after a solve
            replayed.py        the same with the solve in a kernel, and in little memory
            solvers.py         conjugate gradients, Chebyshev iterations, Cholesky, the pseudo-inverse
"""

from models.regression.least_squares.least_squares import LeastSquares

__all__ = ["LeastSquares"]
