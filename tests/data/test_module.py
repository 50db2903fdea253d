"""The loaders under Lightning itself: what a run sees, what a resumed one sees, and what validation does."""

import logging
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from data.batch import batch_arithmetic
from data.mixture import Mixture
from data.module import DataModule, TrainLoader, collate, packs
from data.synthetic import AssociativeRecall
from data.text import IGNORE, Text

N, B, STEPS = 53, 8, 12  # 6 steps an epoch: a run crosses its end


def recall(seed=0):
    return AssociativeRecall(seq_len=8, num_pairs=1, vocab_size=4096, train_size=N, validation_size=10, seed=seed)


def module(micro_batch=2, num_steps=STEPS, task=None, sequences=B, **settings):
    batch = batch_arithmetic(sequences * 8, 8, micro_batch, 1, num_steps * sequences * 8)
    return DataModule(task or recall(), batch, **{"seed": 3, "validation_tokens": 7 * 8, **settings})


class Recorder(L.LightningModule):
    """Notes the first key and value of every sequence, by the optimizer step that uses it."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[int, list] = {}
        self.validated: list[int] = []

    def training_step(self, batch, index):
        pairs = [tuple(row) for row in batch["input_ids"][:, :2].tolist()]
        self.seen.setdefault(self.trainer.global_step, []).extend(pairs)
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, index):
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def steps(self):
        return {step: sorted(pairs) for step, pairs in self.seen.items()}


def run(folder, data, model=None, checkpoint=None, max_steps=STEPS, validate_every=None):
    model = model or Recorder()
    accumulation = data.batch.accumulation
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1 if validate_every else 0,
        check_val_every_n_epoch=None,
        val_check_interval=validate_every * accumulation if validate_every else None,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    return model, trainer


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, _ = run(folder, module())
    assert sorted(model.seen) == list(range(STEPS)) and all(len(x) == B for x in model.seen.values())
    return folder, model.steps()


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
@pytest.mark.parametrize("step", [3, 5, 6, 11])
def test_a_resumed_run_sees_the_same_batches_whatever_the_micro_batch(uninterrupted, tmp_path, step, micro_batch):
    folder, steps = uninterrupted
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*dataloader is not resumable.*")
        model, trainer = run(tmp_path, module(micro_batch), checkpoint=folder / f"step={step}.ckpt")
    assert model.steps() == {s: pairs for s, pairs in steps.items() if s >= step}
    assert trainer.global_step == STEPS
    assert trainer.fit_loop.epoch_loop.batch_progress.total.ready == STEPS * B // micro_batch


def test_resuming_twice_with_other_accumulations(uninterrupted, tmp_path):
    folder, steps = uninterrupted
    run(tmp_path, module(8), checkpoint=folder / "step=3.ckpt", max_steps=5)
    model, _ = run(tmp_path, module(1), checkpoint=tmp_path / "step=5.ckpt")
    assert model.steps() == {s: pairs for s, pairs in steps.items() if s >= 5}


def test_a_run_can_be_made_longer_after_it_ended(uninterrupted, tmp_path):
    folder, steps = uninterrupted
    model, trainer = run(tmp_path, module(num_steps=20), checkpoint=folder / f"step={STEPS}.ckpt", max_steps=20)
    assert sorted(model.seen) == list(range(STEPS, 20)) and trainer.global_step == 20
    longer, _ = run(tmp_path / "longer", module(num_steps=20), max_steps=20)
    assert {**steps, **model.steps()} == longer.steps()


def test_a_checkpoint_within_an_accumulation_window_repeats_the_window(uninterrupted, tmp_path):
    class Midway(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4 * 4 + 3:
                trainer.save_checkpoint(tmp_path / "midway.ckpt")

    model = Recorder()
    model.configure_callbacks = lambda: [Midway()]
    run(tmp_path, module(2), model)
    resumed, _ = run(tmp_path, module(2), checkpoint=tmp_path / "midway.ckpt")
    assert resumed.steps() == {s: pairs for s, pairs in uninterrupted[1].items() if s >= 4}


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_validation_stays_at_its_steps_after_a_resume(tmp_path, micro_batch):
    model, _ = run(tmp_path, module(2), validate_every=4)
    assert model.validated == [4, 8, 12]
    # Lightning takes the validation of the step that it resumes from for done, here step 4
    for step, expected in ((3, [4, 8, 12]), (4, [8, 12]), (5, [8, 12])):
        data, checkpoint = module(micro_batch), tmp_path / f"step={step}.ckpt"
        resumed, _ = run(tmp_path / "resumed", data, checkpoint=checkpoint, validate_every=4)
        assert resumed.validated == expected, step


def test_other_data_are_refused(uninterrupted, tmp_path):
    checkpoint = uninterrupted[0] / "step=3.ckpt"
    with pytest.raises(ValueError, match=r"made on other data.*data fingerprint was .* and is .*seed was 3 and is 4"):
        run(tmp_path, module(task=recall(seed=1), seed=4), checkpoint=checkpoint)


def test_a_loader_says_what_the_data_were_and_are():
    """Checkpoints of before did not keep it, and go on where the data are the same."""
    now = TrainLoader({"data fingerprint": "a"}, "python_source (CPython 3.13.0)", [0])
    now.load_state_dict({"data fingerprint": "a"})
    now.load_state_dict({"data fingerprint": "a", "data": "the same by another name"})
    other = TrainLoader({"data fingerprint": "b"}, "python_source (CPython 3.11.7)", [0]).state_dict()
    for saved, was in ((other, "python_source (CPython 3.11.7)"), ({"data fingerprint": "b"}, "what was not recorded")):
        with pytest.raises(ValueError, match="data fingerprint was 'b' and is 'a'") as caught:
            now.load_state_dict(saved)
        assert f"it: then {was}, now python_source (CPython 3.13.0); data" in str(caught.value)


def attached(data, rank=0, world=1, step=0, accumulation=1):
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        global_step=step,
        accumulate_grad_batches=accumulation,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_validation_is_the_same_set_for_every_world_size(world, micro_batch):
    loaders = [attached(module(micro_batch), rank, world).val_dataloader() for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    rows = []
    for loader in loaders:
        for batch in loader:
            assert batch["input_ids"].shape == (micro_batch, 8)
            labelled = (batch["labels"] != IGNORE).any(-1)
            rows += [tuple(row) for row in batch["input_ids"][labelled].tolist()]
    samples = recall().validation_samples()
    assert sorted(rows) == sorted(tuple(samples[i * 10 // 7]["input_ids"].tolist()) for i in range(7))


def test_validation_is_capped_by_what_there_is_and_can_be_longer():
    assert len(attached(module(1, validation_tokens=10**9)).val_dataloader()) == 10
    longer = attached(module(1, validation_tokens=33)).validation_loader(16)
    assert len(longer) == 3 and next(iter(longer))["labels"].shape == (1, 16)


def test_fewer_tokens_to_validate_on_are_said():
    said = "validation_tokens=81 is more than are held out: all 80 are validated on"
    assert module(validation_tokens=81).describe() == [*recall().describe(), said]
    assert module(validation_tokens=80).describe() == recall().describe()


def test_workers_change_nothing():
    def batches(num_workers):
        data = attached(module(2, num_workers=num_workers, num_steps=2), accumulation=4)
        data.trainer.fit_loop = SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(ready=0)))
        )
        return [batch["input_ids"].tolist() for batch in data.train_dataloader()]

    assert batches(1) == batches(0)


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match=r"batch_tokens=512 is 64 sequences of seq_len=8, and the data has 53"):
        attached(module(64, sequences=64)).train_dataloader()
    with pytest.raises(ValueError, match=r"num_workers=-1 must not be negative"):
        module(num_workers=-1)
    with pytest.raises(ValueError, match=r"validation_tokens=0 must be positive"):
        module(validation_tokens=0)


def test_text_always_says_where_documents_begin():
    """Blocks would be compiled again for a batch that doesn't. Of a task whose rows are one document none does."""
    one = {name: torch.zeros(2, 4, dtype=torch.int64) for name in ("input_ids", "labels", "segments")}
    assert collate(one)["segments"] is None
    assert packs(Text) and packs(Mixture) and not packs(recall())
    assert collate(one, documents=True)["segments"].equal(one["segments"])
    two = {**one, "segments": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])}
    assert collate(two)["segments"].equal(two["segments"])
