"""The global order: which samples are in which batch, as a pure function of (seed, step).

Epoch e is a permutation of all samples, drawn from the seed and e alone. Step s takes its next B samples, whoever asks:

    steps per epoch  = floor(num_samples / B)
    batch of step s  = permutation_e[k B : (k+1) B],   e, k = divmod(s, steps per epoch)

The rest of an epoch, fewer than B samples and others each time, is dropped.

Samples of several kinds, which may not share a batch, are permuted kind by kind; then the batches are permuted.

There is no state to save: to resume is to start at the trainer's step. World size, micro-batch and number of workers
may change in between, because they only decide who computes which part of a batch; rank r takes every world-th sample
from the r-th on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data.batch import Batch


class GlobalOrder:
    """A batch sampler that yields one rank's micro-batches, from step `first_step` to step `num_steps` - 1.

    num_samples: of the data set; of one with several kinds a number for each.  batch: how a step's sequences are
    divided (data.batch).  overfit: every step takes the batch of step 0.

    `len` counts the micro-batches of all steps, those before `first_step` included: Lightning counts on from where a
    resumed run was, and a loader without a length would lose it a batch at every resume.
    """

    def __init__(
        self,
        num_samples: int | Sequence[int],
        batch: Batch,
        seed: int,
        rank: int = 0,
        first_step: int = 0,
        overfit: bool = False,
    ):
        assert 0 <= rank < batch.groups and first_step >= 0, (rank, batch, first_step)
        self.sizes = [num_samples] if isinstance(num_samples, int) else list(num_samples)
        if batch.sequences > min(self.sizes):
            raise ValueError(
                f"batch_tokens={batch.tokens} is {batch.sequences:,} sequences of seq_len={batch.seq_len}, and the "
                f"data has {min(self.sizes):,} to train on"
            )
        self.batch, self.seed = batch, seed
        self.rank, self.first_step, self.overfit = rank, first_step, overfit
        self.steps_per_epoch = sum(size // batch.sequences for size in self.sizes)
        self._epoch, self._batches = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.batch.num_steps * self.batch.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.batch.num_steps):
            mine = self.samples(0 if self.overfit else step)[self.rank :: self.batch.groups].tolist()
            for i in range(0, len(mine), self.batch.micro_batch):
                yield mine[i : i + self.batch.micro_batch]

    def samples(self, step: int) -> Tensor:
        """Those of a step, of all ranks. int64 [B]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, epoch_batches(self.sizes, self.batch.sequences, self.seed, epoch)
        return self._batches[place]


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    """int64 [num_samples]."""
    return torch.randperm(num_samples, generator=_generator(seed, epoch))


def _generator(seed: int, epoch: int) -> torch.Generator:
    # seed + epoch alone would make epoch 1 of seed 1 the same as epoch 0 of seed 2: not the independent runs one wants
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def epoch_batches(sizes: Sequence[int], size: int, seed: int, epoch: int) -> Tensor:
    """int64 [steps of an epoch, size]. 8 bytes a sample: 200 MB for 100 G tokens in sequences of 4096."""
    generator = _generator(seed, epoch)
    begin, kinds = 0, []
    for count in sizes:
        chosen = torch.randperm(count, generator=generator)[: count // size * size]
        kinds.append(chosen.view(-1, size) + begin if begin else chosen.view(-1, size))
        begin += count
    return kinds[0] if len(kinds) == 1 else torch.cat(kinds)[torch.randperm(sum(map(len, kinds)), generator=generator)]
