"""The arithmetic of a batch: how the tokens of one optimizer step are divided over devices and micro-batches."""

from __future__ import annotations

from typing import NamedTuple


class Batch(NamedTuple):
    """tokens = seq_len * micro_batch * groups * accumulation. context: how many devices share each sequence."""

    tokens: int
    seq_len: int
    micro_batch: int
    world_size: int
    accumulation: int
    num_steps: int
    context: int = 1

    @property
    def sequences(self) -> int:
        return self.tokens // self.seq_len

    @property
    def groups(self) -> int:
        """Of devices that share their sequences: as many as devices, where none do."""
        return self.world_size // self.context

    def __str__(self) -> str:
        places = f"{self.world_size} device{'s' * (self.world_size > 1)}"
        if self.context > 1:
            places = f"{self.groups} group{'s' * (self.groups > 1)} of {self.context} devices"
        return (
            f"{self.tokens:,} tokens a step = {self.seq_len:,} tokens x {self.micro_batch} sequences "
            f"x {places} x {self.accumulation} accumulated; "
            f"{self.num_steps:,} steps = {self.num_steps * self.tokens:,} tokens"
        )


def batch_arithmetic(
    batch_tokens: int, seq_len: int, micro_batch: int, world_size: int, tokens: int, context: int = 1
) -> Batch:
    """Derives the accumulation. Raises ValueError where the batch does not divide, with values that do: a line for each
    thing that is wrong.
    """
    sizes = {"batch_tokens": batch_tokens, "seq_len": seq_len, "micro_batch": micro_batch, "tokens": tokens}
    if found := [f"{name}={value} must be at least 1" for name, value in sizes.items() if value < 1]:
        raise ValueError("\n".join(found))
    sequences, rest = divmod(batch_tokens, seq_len)
    groups = max(1, world_size // context)
    each = sequences // groups
    micro_batch = min(micro_batch, max(1, each))  # a limit of memory; with fewer sequences to a device it holds less
    if world_size % context:
        found.append(f"context_parallel={context} does not divide the {world_size} device(s)")
    if seq_len % context:
        found.append(f"context_parallel={context} does not divide seq_len={seq_len}")
    if rest:
        near = max(seq_len, batch_tokens - rest)
        found.append(
            f"batch_tokens={batch_tokens} is not a multiple of seq_len={seq_len}; "
            f"the nearest are {near} and {near + seq_len}"
        )
    elif sequences % groups:
        found.append(
            f"batch_tokens={batch_tokens} is {sequences} sequences, which {groups} "
            f"{'devices' if context == 1 else f'groups of {context} devices'} cannot share equally"
        )
    elif each % micro_batch:
        allowed = [n for n in range(1, each + 1) if each % n == 0]
        found.append(
            f"micro_batch={micro_batch} does not divide the {each} sequences that each of {world_size} device(s) has "
            f"in a step (batch_tokens / seq_len / devices); allowed: {', '.join(map(str, allowed))}"
        )
    if tokens < batch_tokens:
        found.append(f"tokens={tokens} is less than one step, batch_tokens={batch_tokens}")
    if found:
        raise ValueError("\n".join(found))
    return Batch(batch_tokens, seq_len, micro_batch, world_size, each // micro_batch, tokens // batch_tokens, context)


def every(value: float, num_steps: int, name: str) -> int:
    """Steps between two events: `value` below 1 is a fraction of the run, else a number of steps."""
    if value <= 0:
        raise ValueError(f"{name}={value} must be positive: below 1 a fraction of the run, else a number of steps")
    return max(1, round(value * num_steps)) if value < 1 else min(int(value), num_steps)
