"""torchrun's store outlives an attempt: what an earlier one has left there must not be taken for today's."""

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from models.training.meeting import is_here, meet, own_store


def test_each_attempt_has_a_store_of_its_own():
    old = dist.TCPStore("127.0.0.1", 0, is_master=True)
    old.set("asked by 1", "a word of a process that was killed")
    stores: list[tuple[str, int]] = []
    for world_size in (3, 2, 2):
        with ThreadPoolExecutor(world_size) as pool:
            ranks = reversed(range(world_size))
            found = {*pool.map(lambda rank, n: own_store("127.0.0.1", old.port, rank, n), ranks, [world_size] * 3)}
        assert len(found) == 1
        stores += found
    assert len({("127.0.0.1", old.port), *stores}) == 4 and {address for address, _ in stores} == {"127.0.0.1"}


def test_an_address_of_another_machine_is_none_of_this_one():
    assert is_here("localhost") and not is_here("192.0.2.1")  # which is kept for examples (RFC 5737)


def test_without_torchrun_nothing_is_opened(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    meet()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    meet()
