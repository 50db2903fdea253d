"""Sums over the programs that share a scan, that of a document of a head (deep/) or of all of a sequence's (ttt/): each
leaves its part in memory, waits for the others, and adds all parts up in their order, so that all have the same bits in
every run.

The programs of a scan are neighbours in the grid. A GPU starts programs in the order of the grid, so that at most one
scan has some that wait for others not yet started, and those start as soon as any other scan ends.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(arrived):
    """Counts this program as one that has stored its part. What it does before it waits costs no time of its own."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")


@triton.jit
def wait(arrived, count):
    """Goes on when `count` arrivals have been counted, one for each program and meeting; what was stored before them is
    then seen. A place in memory may be written again two meetings later: all have read it by then."""
    while tl.atomic_add(arrived, 0, sem="relaxed") < count:
        pass
    tl.atomic_add(arrived, 0, sem="acquire")  # once: it empties the first cache, spilled registers with it
    tl.debug_barrier()


@triton.jit
def meet(arrived, count):
    arrive(arrived)
    wait(arrived, count)


@triton.jit
def total(at, SPLIT: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of what the programs have stored, WIDTH apart; past the caches of a multiprocessor."""
    x = tl.load(at, cache_modifier=".cg")
    for i in tl.static_range(1, SPLIT):
        x += tl.load(at + i * WIDTH, cache_modifier=".cg")
    return x
