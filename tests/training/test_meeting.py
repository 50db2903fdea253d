"""torchrun's store outlives an attempt: what an earlier one has left there must not be taken for today's."""

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from models.training.meeting import meet, own_port


def test_each_attempt_has_a_store_of_its_own():
    old = dist.TCPStore("127.0.0.1", 0, is_master=True)
    old.set("asked by 1", "a word of a process that was killed")
    ports: list[int] = []
    for world_size in (3, 2, 2):
        with ThreadPoolExecutor(world_size) as pool:
            ranks = reversed(range(world_size))
            found = {*pool.map(lambda rank, n: own_port("127.0.0.1", old.port, rank, n), ranks, [world_size] * 3)}
        assert len(found) == 1
        ports += found
    assert len({old.port, *ports}) == 4


def test_without_torchrun_nothing_is_opened(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    meet()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    meet()
