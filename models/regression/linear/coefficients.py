"""The coefficients of momentum.py's chunks: what every token reads and refers to, and what a chunk carries on, as
combinations of the chunk's first matrices and of its writes (mixtures.py). The formulas are chunked_momentum's.

Shapes: B batch, T tokens, H heads, C chunk, M = N B H chunks, c writes of a token, n matrices of the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.regression.chunks import fades, into_chunks
from models.regression.linear.mixtures import Mixture, product
from models.regression.linear.references import References


def mixtures(
    step_size: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor | None,
    where: References,
    chunk: int,
    dtype: torch.dtype,
    with_reference: bool,
) -> tuple[Mixture, Mixture, Mixture]:
    """What a chunk reads, M_t for its C tokens; what it refers to, M_ref(t); what it carries on, the n matrices after
    its last token: M, S and, with_reference, M_ref. Gates [B, T, H], step_size [B, T c, H].
    """
    c = step_size.shape[1] // log_momentum.shape[1]
    real = into_chunks(torch.ones_like(log_momentum), chunk, dtype)  # 0 where the last chunk is filled up
    theta = into_chunks(step_size, chunk * c, dtype)
    log_momentum, log_decay = (into_chunks(x, chunk, dtype) for x in (log_momentum, log_decay))
    n, (read, carry) = 3 if with_reference else 2, of_gates(real, theta, log_momentum, log_decay)
    carried, first, token = _places(where, chunk, step_size.shape[2], dtype).split([1, 1, chunk], dim=-1)
    at_token = product(token, torch.cat([*read], dim=-1))
    at_first = torch.cat([first, torch.zeros_like(first), carried][:n], dim=-1)
    refer = Mixture(F.pad(at_token[..., :2], (0, n - 2)) + at_first, at_token[..., 2:])
    if with_reference:
        states = torch.cat([F.pad(carry.states, (0, 1)), refer.states[:, -1:]], dim=1)
        carry = Mixture(states, torch.cat([carry.writes, refer.writes[:, -1:]], dim=1))
    return read, Mixture(*(_repeated(x, c, 1) for x in refer)), carry


def _repeated(x: Tensor, times: int, dim: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, dim)


def of_gates(
    real: Tensor, theta: Tensor, log_momentum: Tensor | None, log_decay: Tensor | None
) -> tuple[Mixture, Mixture]:
    """What the tokens of a chunk read, and what it carries on, M and S; without momentum M alone. Gates in chunks
    [M, C, 1], theta [M, C c, 1], all 0 where no token is; so is `real`, which is 1 elsewhere.
    """
    decay, c = fades(real, log_decay), theta.shape[1] // real.shape[1]

    def of_writes(tokens: Tensor) -> Tensor:
        """From what is left of each token [M, *, C], what is of each of its writes."""
        return _repeated(tokens, c, -1) * theta.mT

    if log_momentum is None:
        writes = of_writes(decay.within)
        return Mixture(decay.start, writes), Mixture(decay.start[:, -1:], writes[:, -1:])
    momentum = fades(real, log_momentum)
    a, eta = (x.within.expand(len(real), -1, -1) for x in (decay, momentum))
    # where no token is nothing fades, and the momentum must not be added to the memory once more
    summed = product(a, torch.cat([momentum.start, eta], dim=-1) * real)
    read = Mixture(torch.cat([decay.start, summed[..., :1]], dim=-1), of_writes(summed[..., 1:]))
    states = torch.stack([read.states[:, -1], F.pad(momentum.start[:, -1], (1, 0))], dim=1)
    return read, Mixture(states, torch.stack([read.writes[:, -1], of_writes(eta[:, -1:])[:, 0]], dim=1))


def _places(where: References, chunk: int, heads: int, dtype: torch.dtype) -> Tensor:
    """[M, C, 2 + C]: a one where a token's reference is: the carried one, the chunk's first memory, or that after token
    0, 1, .. of the chunk; none where it is empty. What fills the last chunk repeats the last token's.
    """
    T = where.source.shape[1]
    index = torch.arange(T + -T % chunk, device=where.source.device)
    source, empty = (x[:, index.clamp(max=T - 1)].unflatten(1, (-1, chunk)).transpose(0, 1) for x in where[:2])
    place = (source - index[::chunk].view(-1, 1, 1) + 2).clamp(min=0)  # [N, B, C]
    found = (place.unsqueeze(-1) == torch.arange(2 + chunk, device=index.device)) & ~empty.unsqueeze(-1)
    return found.to(dtype).repeat_interleave(heads, 1).flatten(0, 1)
