"""The global order: which samples are in which batch, as a pure function of (seed, step).

Epoch e is a permutation of all samples, drawn from the seed and e alone. Step s takes its next B samples, whoever asks:

    steps per epoch  = floor(num_samples / B)
    batch of step s  = permutation_e[k B : (k+1) B],   e, k = divmod(s, steps per epoch)

The rest of an epoch, fewer than B samples and others each time, is dropped.

There is no state to save: to resume is to start at the trainer's step. World size, micro-batch and number of workers
may change in between, because they only decide who computes which part of a batch; rank r takes every world-th sample
from the r-th on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class GlobalOrder:
    """A batch sampler that yields one rank's micro-batches, from step `first_step` to step `num_steps` - 1.

    num_samples   of the data set
    batch_size    sequences in a global batch: one step of the optimizer, all ranks together
    micro_batch   sequences a rank computes at once; accumulation = batch_size / (micro_batch x world)
    num_steps     of the whole run, over as many epochs as it takes

    `len` counts the micro-batches of all steps, those before `first_step` included: Lightning counts on from where a
    resumed run was, and a loader without a length would lose it a batch at every resume.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        micro_batch: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        first_step: int = 0,
    ):
        assert 0 <= rank < world and first_step >= 0, (rank, world, first_step)
        if batch_size > num_samples:
            raise ValueError(
                f"a global batch of {batch_size:,} sequences is more than the data's {num_samples:,} training sequences"
            )
        self.num_samples, self.batch_size, self.micro_batch = num_samples, batch_size, micro_batch
        self.num_steps, self.seed, self.rank, self.world, self.first_step = num_steps, seed, rank, world, first_step
        self.accumulation = accumulation(batch_size, micro_batch, world)
        self.steps_per_epoch = num_samples // batch_size

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        epoch, permutation = -1, torch.empty(0)
        for step in range(self.first_step, self.num_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                permutation = epoch_permutation(self.num_samples, self.seed, epoch)
            start = step % self.steps_per_epoch * self.batch_size
            mine = permutation[start : start + self.batch_size][self.rank :: self.world].tolist()
            for i in range(0, len(mine), self.micro_batch):
                yield mine[i : i + self.micro_batch]


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    """int64 [num_samples]. 8 bytes a sample: 200 MB for 100 G tokens in sequences of 4096."""
    # seed + epoch alone would make epoch 1 of seed 1 the same as epoch 0 of seed 2: not the independent runs one wants
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def accumulation(batch_size: int, micro_batch: int, world: int) -> int:
    """Micro-batches of one rank in a step."""
    if min(batch_size, micro_batch, world) < 1:
        raise ValueError(f"batch_size={batch_size} and micro_batch={micro_batch} must be positive")
    steps, rest = divmod(batch_size, micro_batch * world)
    if rest:
        raise ValueError(
            f"a global batch of {batch_size} sequences does not divide by micro_batch={micro_batch} x {world} devices; "
            f"a multiple of {micro_batch * world} is needed"
        )
    return steps
