"""Which rule a call of the momentum kernels computes."""

from __future__ import annotations

from typing import NamedTuple

CHUNK = 64
EMPTY = 2**30  # a source: no memory, but zero


class Rule(NamedTuple):
    """Which of its parts a call has. momentum: S. carried: M_ref as one more matrix, in and out. solve: whether errors
    refer to each other; not where every gradient of a chunk is taken at its first memory, which is then what comes out
    as M_ref. decayed: gradients taken after the decay, at a_t M_{t-1}, which without momentum is the gated delta rule.
    writes: of every so many tokens the last alone adds S to M; all write to S.
    """

    momentum: bool = True
    carried: bool = False
    solve: bool = True
    decayed: bool = False
    writes: int = 1

    @property
    def num_matrices(self) -> int:
        return 1 + self.momentum + self.carried


EXACT = Rule()
