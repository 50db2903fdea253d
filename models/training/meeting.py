"""Where the processes of a run meet that torchrun has started, and perhaps started anew.

torchrun hands all its attempts one store, and torch writes the addresses of processes there under the same names each
time. So a process of the second attempt may read where one of the first was, and is refused, or waits for ever
(https://github.com/pytorch/pytorch/issues/135712, and still so in torch 2.13). TORCHELASTIC_RESTART_COUNT tells
attempts apart on one node only: a node that comes later counts from zero.
"""

from __future__ import annotations

import os
import socket
import time
import uuid

import torch.distributed as dist

PAUSE = 0.05  # waiting is done here, not in the store: so a signal is heard
OPENED: list[dist.TCPStore] = []  # by the first process, and open as long as it lives


def meet() -> None:
    """Opens a store for this attempt alone, and has torch's env:// take it. Without torchrun nothing is done."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    given = (int(os.environ[name]) for name in ("MASTER_PORT", "RANK", "WORLD_SIZE"))
    address, port = own_store(os.environ["MASTER_ADDR"], *given)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def own_store(address: str, port: int, rank: int, world_size: int) -> tuple[str, int]:
    """Address and port of a new store of the first process. By the old one it is told to the others.

    Whatever stands in the old one may be an earlier attempt's. So each of the others asks by a word that nobody had
    before, and the first answers whoever asks, until all have come to the new store.
    """
    old = dist.TCPStore(address, port, is_master=False)
    if rank > 0:
        word = uuid.uuid4().hex
        old.set(f"asked by {rank}", word)
        while not old.check([word]):
            time.sleep(PAUSE)
        where, found = old.get(word).decode().split()
        dist.TCPStore(where, int(found), is_master=False).set(f"here is {rank}", "")
        return where, int(found)
    new = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    OPENED.append(new)
    where = address if is_here(address) else socket.getfqdn()  # the old one may be another node's
    missing = list(range(1, world_size))
    while missing := [x for x in missing if not new.check([f"here is {x}"])]:
        for x in missing:
            if old.check([f"asked by {x}"]):
                old.set(old.get(f"asked by {x}").decode(), f"{where} {new.port}")
        time.sleep(PAUSE)
    return where, new.port


def is_here(address: str) -> bool:
    """Whether it is one of this machine: others can't be bound to."""
    try:
        socket.create_server((address, 0)).close()
    except OSError:
        return False
    return True
