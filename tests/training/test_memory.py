"""A run that does not fit into memory says which setting to lower, and to what. No GPU is needed to say it."""

from __future__ import annotations

import pytest
import torch

import train as entry
from data.batch import batch_arithmetic
from models.training.memory import why
from models.training.run import RunError

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")

COMPILING = RuntimeError("backend='inductor' raised: OutOfMemoryError")  # what it tried out did not fit
COMPILING.__cause__ = FULL


def batch(micro_batch: int, sequences: int = 24):
    return batch_arithmetic(512 * sequences, 512, micro_batch, 1, 512 * sequences)


@pytest.mark.parametrize(
    "error, micro_batch, said",
    [
        (FULL, 12, "micro_batch=12, 12 sequences of 512 tokens, needs more memory than there is (this machine has "),
        (FULL, 12, "set micro_batch=8, which needs 33% less for activations and takes the same steps"),
        (FULL, 2, "set micro_batch=1, which needs 50% less"),
        (FULL, 1, "1 sequence of 512 tokens, needs"),
        (FULL, 1, "set seq_len=256, a smaller size=, or strategy=fsdp on more devices"),
        (COMPILING, 8, "set micro_batch=6,"),
        (MemoryError(), 8, "set micro_batch=6,"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 8, "set micro_batch=6,"),
        (RunError("ten steps in a row"), 8, "ten steps in a row"),
    ],
)
def test_what_to_lower(error, micro_batch, said):
    assert said in why(error, batch(micro_batch))
    for name in ("micro_batch=", "seq_len="):  # what is proposed is possible
        proposed = why(error, batch(micro_batch)).rpartition(f"set {name}")[2].partition(",")[0]
        if name == "micro_batch=" and proposed.isdigit():
            assert 24 % int(proposed) == 0


def test_the_memory_of_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**28, 140 * 2**30))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 138 * 2**30)
    assert "(139.8 of 140.0 GiB are in use, and this run held up to 138.0)" in why(FULL, batch(8))


def test_another_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes differ"):
        why(RuntimeError("shapes differ"), batch(8))


def test_a_process_that_is_gone_is_told():
    gone = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1")
    assert why(gone, batch(8)).startswith("another process of this run is gone")


def test_train_py_says_it(monkeypatch, tmp_path):
    def full(*_, **__):
        raise FULL

    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setenv("TTR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lightning.Trainer.fit", full)
    monkeypatch.setattr("sys.argv", ["train.py", "data=mqar", "data.train_size=64", "data.validation_size=8",
                                     "validation_tokens=64", "trainer.accelerator=cpu"])  # fmt: skip
    with pytest.raises(SystemExit, match=r"^error: micro_batch=8, 8 sequences of 128 tokens, .*; set micro_batch=4, "):
        entry.main()
