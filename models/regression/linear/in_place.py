"""In-place test-time training: the last matrix of a feed-forward layer goes on learning (Feng et al. 2026,
https://arxiv.org/abs/2604.06169, section 3 and algorithm 1; code: ByteDance-Seed/In-Place-TTT).

    z_t = silu(x_t W_a) * (x_t W_b)                     keys, and queries as well
    v_i = (sum_{|j| <= R} w_j * x_{i+j}) W_v            values: what stands around token i, R tokens to come among it
    L_b(M) = - sum_{i in b} (z_i M) . v_i               of a mini-batch b
    M_b = M_{b-1} - eta dL_b/dM = M_{b-1} + eta sum_{i in b} z_i v_i ,    M_0 = W_c
    y_t = z_t M_{b-1} ,                                 t in b

A linear memory in the features z, which takes one step of size eta at the end of each mini-batch of a document, and
begins with what training has put there. eta = 0 is the feed-forward layer itself. In a value a token to come counts
only where it is in the same mini-batch; so nothing is read before it was seen.

Parallel form: what token t reads beyond z_t W_c is eta sum_i (z_t . z_i) v_i over the mini-batches before its own, a
sum as linear attention has it, under a mask.

The paper has the objective and the step (its equation 1), and begins anew with each document. R = 2, w = 0 at the start
and x, the layer's input, where the paper has the embedding of the token, are the published code's (`ttt_target` there
chooses one). Its eta is 0.3; one here is for widths of its own (block.py).

Shapes: B batch, T tokens, D model width, F features, N = R + T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.precision import working_dtype
from models.regression.documents import positions

Project = Callable[[Tensor], Tensor]  # by W_v


class State(NamedTuple):
    """written [B, F, D]: sum of z v over the mini-batches of the document that are over; present [B, F, D]: over what
    the present one has so far. z [B, R, F] and x [B, R, D]: its last tokens, zeros where it has fewer. phase [B]: how
    many it has. segment [B]: the document's number, None where none was told.
    """

    written: Tensor
    present: Tensor
    z: Tensor
    x: Tensor
    phase: Tensor
    segment: Tensor | None


def empty(x: Tensor, z: Tensor, reach: int) -> State:
    """Before the first of tokens like x [B, T, D] and z [B, T, F]."""
    B, dtype = len(x), working_dtype(x, z)
    memory = x.new_zeros(B, z.shape[2], x.shape[2], dtype=dtype)
    z, x = (y.new_zeros(B, reach, y.shape[2]) for y in (z, x))
    return State(memory, memory, z, x, torch.zeros(B, dtype=torch.long, device=x.device), None)


def entered(state: State, segment: Tensor | None) -> State:
    """The state as the document `segment` [B] finds it: emptied where that is another. Without segments, all is 0."""
    if segment is None:
        return state
    new = segment != (torch.zeros_like(segment) if state.segment is None else state.segment)
    written, present, z, x = (y.masked_fill(new.view(-1, 1, 1), 0) for y in state[:4])
    return State(written, present, z, x, state.phase.masked_fill(new, 0), segment)


def recurrent_in_place(
    x: Tensor,
    z: Tensor,
    taps: Tensor,
    project: Project,
    grad_batch: int,
    state: State | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, State]:
    """What each token reads of all sums z v, [B, T, D], and the state after the last: the definition, token by token.

    x [B, T, D], z [B, T, F]; taps [D, 2 R + 1]: w_-R to w_R; grad_batch: tokens of a mini-batch; segments [B, T].
    """
    R, reads, dtype = taps.shape[1] // 2, [], working_dtype(x, z)
    state = empty(x, z, R) if state is None else state
    for t in range(x.shape[1]):
        state = entered(state, None if segments is None else segments[:, t])
        reads.append((z[:, t, None].to(dtype) @ state.written).squeeze(1))
        near, keys = torch.cat([state.x, x[:, t, None]], 1), torch.cat([state.z, z[:, t, None]], 1)
        w = taps.to(near.dtype).T
        before = near[:, -1:] * w[R + 1 :].flip(0)  # this token in the values of the R before it
        values = project(torch.cat([before, (near * w[: R + 1]).sum(1, keepdim=True)], 1))
        present = state.present + keys.mT.to(dtype) @ values.to(dtype)
        phase = (state.phase + 1) % grad_batch
        over = (phase == 0).view(-1, 1, 1)
        written = torch.where(over, state.written + present, state.written)
        present, last_z, last_x = (y.masked_fill(over, 0) for y in (present, keys[:, 1:], near[:, 1:]))
        state = State(written, present, last_z, last_x, phase, state.segment)
    return torch.stack(reads, 1).to(z.dtype), state


def parallel_in_place(
    x: Tensor,
    z: Tensor,
    taps: Tensor,
    project: Project,
    grad_batch: int,
    state: State | None = None,
    segments: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, State | None]:
    """The same map, all tokens at once. state None: an empty one. keep: whether a state is wanted."""
    R, queries = taps.shape[1] // 2, z
    if keep and state is None:
        state = empty(x, z, R)
    if state is not None:
        state = entered(state, None if segments is None else segments[:, 0])
    position, begins = positions(x, None if state is None else state.phase, segments)
    within = position % grad_batch
    batch, document = (within == 0).cumsum(1), begins.cumsum(1)  # numbers; the state's are 0
    batches, documents = batch, document  # of keys
    if state is not None:  # its last tokens are keys once more, for what they see of those that come
        x, z = torch.cat([state.x.to(x.dtype), x], 1), torch.cat([state.z.to(z.dtype), z], 1)
        batches, documents = F.pad(batch, (R, 0)), F.pad(document, (R, 0))
    values = project(around(x, taps, batches, 0 if state is None else R))

    before = (batches.unsqueeze(1) < batch.unsqueeze(2)) & (documents.unsqueeze(1) == document.unsqueeze(2))
    reads = (queries @ z.mT).masked_fill(~before, 0) @ values
    if state is None:
        return reads, None
    old, late = (document == 0).unsqueeze(2), (batch > 0).unsqueeze(2)
    reads = reads + (queries @ state.written.to(z.dtype)).masked_fill(~old, 0)
    reads = reads + (queries @ state.present.to(z.dtype)).masked_fill(~(old & late), 0)
    if not keep:
        return reads, None

    phase = (within[:, -1] + 1) % grad_batch
    over, now, same = (phase == 0).unsqueeze(1), batches == batch[:, -1:], documents == document[:, -1:]
    sums = [
        (z.masked_fill(~which.unsqueeze(2), 0).mT @ values).to(state.written.dtype)
        for which in (same & (over | ~now), now & ~over)
    ]
    goes_on = old[:, -1:] & ~over.unsqueeze(2)
    stays = goes_on & ~late[:, -1:]
    written = state.written.masked_fill(~old[:, -1:], 0) + state.present.masked_fill(stays | ~old[:, -1:], 0) + sums[0]
    present = state.present.masked_fill(~stays, 0) + sums[1]
    z, x = (y[:, -R:].masked_fill(~(now & ~over)[:, -R:].unsqueeze(2), 0) for y in (z, x))
    segment = state.segment if segments is None else segments[:, -1]
    return reads, State(written, present, z, x, phase, segment)


def around(x: Tensor, taps: Tensor, batch: Tensor, seen: int) -> Tensor:
    """sum_j w_j * x_{i+j} over the tokens i + j of i's mini-batch, [B, N, D]. batch [B, N]: numbers of mini-batches;
    seen: of so many first tokens what they see of each other is left out.
    """
    R, N = taps.shape[1] // 2, x.shape[1]
    padded, numbers = F.pad(x, (0, 0, R, R)), F.pad(batch, (R, R), value=-1)
    index, found = torch.arange(N, device=x.device), torch.zeros_like(x)
    for j, w in enumerate(taps.to(x.dtype).T):
        counts = (numbers[:, j : j + N] == batch) & ((index >= seen) | (index + j - R >= seen))
        found = torch.addcmul(found, padded[:, j : j + N].masked_fill(~counts.unsqueeze(2), 0), w)
    return found
