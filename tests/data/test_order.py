"""The laws of the global order: a batch is a function of (seed, step) and of nothing else."""

import pytest

from data.batch import Batch, batch_arithmetic
from data.order import GlobalOrder

N, B, STEPS, SEED = 53, 8, 20, 3  # 6 steps an epoch, 5 samples left over; 20 steps cross three epoch ends


def split(micro_batch=1, world=1, num_steps=STEPS, sequences=B) -> Batch:
    return batch_arithmetic(sequences, 1, micro_batch, world, sequences * num_steps)


def global_batches(world=1, micro_batch=1, first_step=0, seed=SEED, num_steps=STEPS) -> list[frozenset[int]]:
    """The set of samples of every step, gathered over the ranks."""
    batch = split(micro_batch, world, num_steps)
    ranks = [list(GlobalOrder(N, batch, seed, rank, first_step)) for rank in range(world)]
    count = batch.accumulation
    assert all(len(batches) == count * (num_steps - first_step) for batches in ranks)
    assert all(len(batch) == micro_batch for batches in ranks for batch in batches)
    steps = []
    for i in range(0, len(ranks[0]), count):
        samples = [sample for batches in ranks for batch in batches[i : i + count] for sample in batch]
        assert len(samples) == len(set(samples)) == B  # no two ranks have the same sample
        steps.append(frozenset(samples))
    return steps


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 8), (1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_the_same_batches_for_every_world_size_and_micro_batch(world, micro_batch):
    assert global_batches(world, micro_batch) == global_batches()


@pytest.mark.parametrize("first_step", [0, 1, 5, 6, 7, 19, 20])
@pytest.mark.parametrize("world", [1, 4])
def test_resuming_gives_the_rest(first_step, world):
    assert global_batches(world, first_step=first_step) == global_batches()[first_step:]


def test_a_longer_run_begins_like_a_shorter_one():
    assert global_batches(num_steps=40)[:STEPS] == global_batches()


def test_no_sample_repeats_within_an_epoch_and_epochs_differ():
    steps = global_batches()
    for start in (0, 6, 12):
        epoch = steps[start : start + 6]
        assert len(frozenset.union(*epoch)) == 6 * B
    assert steps[:6] != steps[6:12]
    assert frozenset.union(*steps) == frozenset(range(N))  # what one epoch drops is in another


def test_seeds_are_independent_in_every_epoch():
    epochs = [frozenset(global_batches(seed=seed)[e * 6 : e * 6 + 6]) for seed in range(4) for e in range(3)]
    assert len(set(epochs)) == len(epochs)


def test_the_length_counts_all_steps_wherever_it_starts():
    assert {len(GlobalOrder(N, split(2), SEED, first_step=s)) for s in range(STEPS)} == {STEPS * 4}


def test_errors_name_what_does_not_fit():
    with pytest.raises(ValueError, match=r"micro_batch=3 does not divide the 4 sequences.* allowed: 1, 2, 4"):
        split(3, 2)
    with pytest.raises(ValueError, match="8 sequences, which 3 devices cannot share equally"):
        split(1, 3)
    with pytest.raises(ValueError, match="batch_tokens=64 is 64 sequences of seq_len=1, and the data has 53"):
        GlobalOrder(N, split(sequences=64), SEED)


def test_overfit_takes_the_first_batch_for_ever():
    order = list(GlobalOrder(N, split(B), SEED, overfit=True))
    assert order == [order[0]] * STEPS
