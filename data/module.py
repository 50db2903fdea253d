"""The loaders, for Lightning. The only file of this package that knows it.

Training    the batches of `GlobalOrder` from the trainer's step on; a resumed run goes on with the batch that comes
            next, whatever the number of devices, the micro-batch or the number of workers were before.
Validation  a fixed set of sequences, evenly spaced over the validation split, the same for every world size; then the
            test points of a task that has some (data/made.py), all of their sequences.

Give the Trainer `use_distributed_sampler=False` (the ranks are told apart here, and Lightning would shuffle what is in
order), `accumulate_grad_batches` as `data.batch` derives it, and no `max_epochs`: to Lightning the whole run is one
epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from data.batch import Batch
from data.mixture import Mixture
from data.order import GlobalOrder
from data.text import IGNORE


class DataModule(L.LightningDataModule):
    """Loaders of a task (data.text.Text, data.synthetic.AssociativeRecall, data.made.Task).

    batch                how a step's tokens are divided (data.batch)
    validation_tokens    how many tokens to validate on, rounded up to sequences, and at most what the split holds
    overfit              train on the first batch over and over
    documents            whether a batch of text says where documents begin also where each row is one (collate)
    """

    documents = False

    trainer: L.Trainer  # Lightning sets it before it asks for a loader

    def __init__(
        self, task: Any, batch: Batch, validation_tokens: int, seed: int, num_workers: int = 0, overfit: bool = False
    ):
        super().__init__()
        if validation_tokens < 1:
            raise ValueError(f"validation_tokens={validation_tokens} must be positive")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must not be negative")
        self.task, self.batch, self.seed, self.num_workers = task, batch, seed, num_workers
        self.validation_tokens, self.overfit = validation_tokens, overfit

    def describe(self) -> list[str]:
        """The lines of the task, and one where it has fewer tokens to validate on than asked for; of a mixture how
        often each part is read.
        """
        mixed = isinstance(self.task, Mixture)
        parts = self.task.parts if mixed else {"": self.task}
        lines = [*self.task.describe(), *(self.task.passes(self.batch) if mixed else [])]
        for name, part in parts.items():
            held = len(part.validation_samples()) * self.batch.seq_len
            if held * len(parts) < self.validation_tokens:
                asked = f"validation_tokens={self.validation_tokens}" + f" / {len(parts)}" * mixed
                told = f"{asked} is more than are held out: all {held:,} are validated on"
                lines.append(f"{name}: {told}" if mixed else told)
        return lines

    def setup(self, stage: str | None = None) -> None:
        self.task.prepare()

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        samples = self.task.train_samples()
        assert (trainer.accumulate_grad_batches, trainer.world_size) == (self.batch.accumulation, self.batch.world_size)
        kinds = getattr(samples, "sizes", len(samples))  # several where there are kinds
        ordered = self.task.order if isinstance(self.task, Mixture) else partial(GlobalOrder, kinds)
        order = ordered(
            self.batch,
            self.seed,
            rank=trainer.global_rank // self.batch.context,
            first_step=trainer.global_step,
            overfit=self.overfit,
        )
        align_progress(trainer)
        identity = {
            **self.task.identity,
            "seed": self.seed,
            "sequences in a batch": self.batch.sequences,
            "seq_len": self.batch.seq_len,
        }
        return TrainLoader(identity, self.task.describe()[0], samples, batch_sampler=order, **self._loader_settings())

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        first = self.validation_loader(self.batch.seq_len)
        points = [self._loader([x], x.length, [len(x)], num_workers=0) for x in self.test_points().values()]
        return [first, *points] if points else first

    def test_points(self) -> dict[str, Any]:
        """By name, in the order of their loaders. Text has none, nor needs a task of somebody else."""
        return self.task.test_points() if hasattr(self.task, "test_points") else {}

    def validation_loader(self, seq_len: int) -> DataLoader:
        """The validation set in sequences of another length; 2 and 4 times the training length test extrapolation. The
        parts of a mixture follow each other, with as many tokens each, and a batch is of one part.
        """
        mixed = isinstance(self.task, Mixture)
        parts = self.task.validation_parts(seq_len) if mixed else [self.task.validation_samples(seq_len)]
        each = -(-self.validation_tokens // (seq_len * len(parts)))
        return self._loader(parts, seq_len, [min(each, len(samples)) for samples in parts], mixed)

    def _loader(
        self,
        parts: Sequence[Any],
        seq_len: int,
        counts: Sequence[int],
        mixed: bool = False,
        num_workers: int | None = None,
    ) -> DataLoader:
        micro_batch = max(1, self.batch.micro_batch * self.batch.seq_len // seq_len)
        rank, world = (n // self.batch.context for n in (self.trainer.global_rank, self.trainer.world_size))
        shares: list[Share] = [
            Share(samples, count, micro_batch, rank, world, number if mixed else None)
            for number, (samples, count) in enumerate(zip(parts, counts, strict=True))
        ]
        share = ConcatDataset(shares) if mixed else shares[0]
        return DataLoader(share, batch_size=micro_batch, shuffle=False, **self._loader_settings(num_workers))

    def _loader_settings(self, num_workers: int | None = None) -> dict[str, Any]:
        num_workers = self.num_workers if num_workers is None else num_workers
        return {
            "collate_fn": partial(collate, documents=self.documents and packs(self.task)),
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "pin_memory": self.trainer.strategy.root_device.type == "cuda",
        }


def misfits(task: Any, batch: Batch) -> list[str]:
    """A sentence for each setting that does not fit the data, which is known when these are prepared."""
    found, sizes = [], {}
    for split, samples in (("train", task.train_samples), ("validation", task.validation_samples)):
        try:
            found_samples = samples()
            sizes[split] = min(getattr(found_samples, "sizes", [len(found_samples)]))  # of the smallest kind
        except ValueError as error:
            found.append(str(error))
    if sizes.get("train", batch.sequences) < batch.sequences:
        found.append(
            f"batch_tokens={batch.tokens} is {batch.sequences:,} sequences of seq_len={batch.seq_len}, and the data "
            f"has {sizes['train']:,} to train on"
        )
    return found


def packs(task: Any) -> bool:
    """Whether rows of a task may have several documents."""
    return getattr(task, "packs_documents", False)


def collate(samples: list[dict[str, Any]] | dict[str, Any], documents: bool = False) -> dict[str, Any]:
    """A batch, [B, T] each, of samples, or of what is one already. `segments` is None where every row is one document:
    mixers then need no masks, and to see it here costs no transfer from the GPU. documents: but `segments` stay. For a
    process that compiles its blocks compiles them again for the first batch without, and where processes meet in each
    block all others wait meanwhile. `part` is the number of the part of a mixture that all samples are of.
    """
    batch: dict[str, Any] = samples if isinstance(samples, dict) else default_collate(samples)
    if "part" in batch:
        batch["part"] = int(batch["part"][0])
    return batch if documents or batch["segments"].any() else {**batch, "segments": None}


class OtherDataError(ValueError):
    """A checkpoint was made on other data than the run now has."""


class TrainLoader(DataLoader):
    """A loader that saves no position, which the step gives, but what must stay for a step to mean the same batch: the
    identity. Beside it stands what a person calls the data, so that a refusal can say it.
    """

    CALLED = "data"  # checkpoints of before have no such entry

    def __init__(self, identity: dict[str, Any], called: str, dataset: Dataset, **settings: Any):
        super().__init__(dataset, **settings)
        self.identity, self.called = identity, called

    def state_dict(self) -> dict[str, Any]:
        return {**self.identity, self.CALLED: self.called}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        changed = [
            f"{name} was {saved.get(name)!r} and is {now!r}"
            for name, now in self.identity.items()
            if saved.get(name) != now
        ]
        if changed:
            was = saved.get(self.CALLED, "what was not recorded")
            raise OtherDataError(
                f"the checkpoint was made on other data, so that this run can't resume it: then {was}, now "
                f"{self.called}; {'; '.join(changed)}. Give the settings, files and Python that it was started with, "
                "or another name="
            )


class Share(Dataset):
    """One rank's share of `count` samples, evenly spaced over all: every world-th of them, from the rank-th on.

    Padded to whole micro-batches, as many on every rank, with samples that have no label: they weigh nothing where the
    loss is averaged over labels. part: a number that all samples get.
    """

    def __init__(
        self,
        samples: Sequence[dict[str, Tensor]],
        count: int,
        micro_batch: int,
        rank: int,
        world: int,
        part: int | None = None,
    ):
        assert 1 <= count <= len(samples), (count, len(samples))
        self.marks = {} if part is None else {"part": part}
        self.samples, self.indices = samples, [i * len(samples) // count for i in range(rank, count, world)]
        self.size = -(-count // (world * micro_batch)) * micro_batch

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.indices):
            return self.samples[self.indices[index]] | self.marks
        if index >= self.size:
            raise IndexError(index)
        sample = self.samples[0]
        return {**sample, "labels": torch.full_like(sample["labels"], IGNORE), **self.marks}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]] | dict[str, Any]:
        """A batch, in order, at once where the samples are made so."""
        if not hasattr(self.samples, "__getitems__"):
            return [self[index] for index in indices]
        real = [self.indices[index] for index in indices if index < len(self.indices)]
        batch: dict[str, Any] = dict(self.samples.__getitems__([*real, *[0] * (len(indices) - len(real))]))
        batch["labels"] = batch["labels"].clone()
        batch["labels"][len(real) :] = IGNORE
        return batch | {name: torch.full((len(indices),), mark) for name, mark in self.marks.items()}


def align_progress(trainer: L.Trainer) -> None:
    """Restate Lightning's count of batches in the micro-batches of this run.

    Lightning decides from that count where an accumulation window ends and when the epoch does. A resumed run takes it
    from the checkpoint, and it is wrong there if the accumulation has changed (3 steps of 1 micro-batch end in the
    middle of a window of 2), or if the checkpoint was made within a window: its gradients are lost, and the window has
    to be computed again from its start. The count that belongs to step s is s x accumulation.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    counted, expected = progress.total.ready, trainer.global_step * trainer.accumulate_grad_batches
    if counted == expected:
        return
    between_hooks = progress.total.processed == counted and progress.total.completed == counted - 1
    current = progress.current.ready * expected // counted
    for tracker, ready in ((progress.total, expected), (progress.current, current)):
        tracker.ready = tracker.started = tracker.processed = ready
        # a checkpoint from on_train_batch_end has its batch processed but not completed, and Lightning completes it
        tracker.completed = ready - 1 if between_hooks and ready else ready
