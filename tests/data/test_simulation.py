"""1,024 devices in one process: token shards, loaders and a run that goes on from world size to world size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from data.batch import Batch, batch_arithmetic
from data.module import DataModule
from data.text import Text
from data.tokenizer import Bytes
from tests.data.test_module import attached

T, SEQUENCES, STEPS = 8, 1024, 6  # four steps an epoch: the run crosses its end
# from which step on how many devices, how many of them share a sequence, and the micro-batch
RUN = {0: (1, 1, 256), 1: (8, 1, 32), 2: (64, 1, 16), 3: (1024, 1, 1), 4: (1024, 4, 2), 5: (512, 8, 16)}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from tests.data.conftest import Documents

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTR_CACHE", str(tmp_path_factory.mktemp("cache")))
        texts = [f"document {n}, which is number {n * n} of all" * (1 + n % 5) for n in range(290)]
        task = Text(Documents(texts, texts[:9]), Bytes(), seq_len=T, name="many")
        task.prepare()
        yield task


def batch(world: int, context: int, micro_batch: int) -> Batch:
    return batch_arithmetic(SEQUENCES * T, T, micro_batch, world, STEPS * SEQUENCES * T, context)


def loader(task: Text, split: Batch, rank: int, step: int):
    data = attached(DataModule(task, split, T, seed=5), rank, split.world_size, step, split.accumulation)
    total = SimpleNamespace(ready=step * split.accumulation)  # what Lightning has counted so far
    data.trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    return data.train_dataloader()


def step_of_all(task: Text, split: Batch, step: int) -> Tensor:
    """The sequences of a step that all devices have, each once, in an order that does not depend on who has them."""
    rows = []
    for rank in range(0, split.world_size, split.context):
        batches = iter(loader(task, split, rank, step))
        found = [next(batches)["input_ids"] for _ in range(split.accumulation)]
        assert all(x.shape == (split.micro_batch, T) for x in found)
        rows += torch.cat(found).tolist()
    return torch.tensor(sorted(rows))


@pytest.mark.slow
def test_a_run_from_one_to_1024_devices_reads_what_one_device_reads(text):
    assert len(text.train_samples()) // SEQUENCES == 4
    alone = batch(*RUN[0])
    for step, place in RUN.items():
        assert torch.equal(step_of_all(text, batch(*place), step), step_of_all(text, alone, step)), (step, place)


def test_devices_that_share_a_sequence_read_the_same(text):
    split = batch(*RUN[4])
    first, *others = (next(iter(loader(text, split, rank, 4)))["input_ids"] for rank in range(1020, 1024))
    assert all(torch.equal(first, other) for other in others)
