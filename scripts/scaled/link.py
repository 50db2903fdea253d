"""How the GPUs of a host are linked: what the driver and NCCL say, and how fast they exchange.

A device of n sends (n - 1) / n of what all have together where it is gathered or divided, and twice that where all get
the sum (scripts/planning/scaling.py). `gb_per_second` is these bytes over the time, in 1e9: what NVIDIA's nccl-tests
call bus bandwidth, and what a maker's number of the link is to be compared with.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from scripts.scaled.launch import free_port

SIZES, TOY_SIZES = (2**23, 2**27, 2**30), (2**12, 2**16)  # bytes of all together
REPEATS = 5  # the median counts
OLDER = ("all_gather_into_tensor", "reduce_scatter_tensor")  # names of torch before 2.13
KINDS = ("gather", "divide", "sum")  # parameters; gradients; gradients of copies


def measured(devices: int, toy: bool, folder: Path, limit: float) -> dict[str, Any]:
    """`reason` says why it is not known. folder: for what the processes leave."""
    folder.mkdir(parents=True, exist_ok=True)
    fork, port = multiprocessing.get_context("fork"), free_port()
    processes = [fork.Process(target=_process, args=(i, devices, toy, folder, port)) for i in range(devices)]
    deadline = time.monotonic() + limit
    for each in processes:
        each.start()
    for each in processes:
        each.join(max(0.0, deadline - time.monotonic()))
    late = [each for each in processes if each.is_alive()]
    for each in late:
        each.kill()
        each.join()
    found: dict[str, Any] = {"devices": devices, "peer": None, "rates": [], "copy_gb_per_second": None, "reason": ""}
    found |= {"topology": [] if toy else topology(), "transport": transport(folder / "nccl.txt")}
    if (path := folder / "found.json").exists():
        found |= json.loads(path.read_text())
    if late:
        found["reason"] = f"not done within {limit:.0f} s"
    elif codes := [each.exitcode for each in processes if each.exitcode]:
        found["reason"] = f"a process ended with {codes[0]}"
    return found


def _process(rank: int, devices: int, toy: bool, folder: Path, port: int) -> None:
    if rank == 0:
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(folder / "nccl.txt")}
    device = torch.device("cpu" if toy else f"cuda:{rank}")
    if not toy:
        torch.cuda.set_device(device)
    at = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo" if toy else "nccl", init_method=at, rank=rank, world_size=devices)
    found: dict[str, Any] = {"rates": []}
    if not toy:
        found["peer"] = all(torch.cuda.can_device_access_peer(0, i) for i in range(1, devices))
    for size in TOY_SIZES if toy else SIZES:
        for kind in KINDS:
            seconds = _seconds(kind, size, devices, device)
            sent = (2 if kind == "sum" else 1) * (devices - 1) / devices * size
            row = {"kind": kind, "bytes": size, "seconds": seconds, "gb_per_second": sent / seconds / 1e9}
            found["rates"].append(row)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
    if rank == 0 and not toy:
        found["copy_gb_per_second"] = _copied(SIZES[-1])
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _seconds(kind: str, size: int, devices: int, device: torch.device) -> float:
    """Of one exchange, the median of some; size: of all together, in bytes of float32."""
    whole = torch.zeros(size // 4, device=device)
    part = whole.new_zeros(len(whole) // devices)
    single = hasattr(dist, "all_gather_single")
    names = ("all_gather_single", "reduce_scatter_single") if single else OLDER
    gather, divide = (getattr(dist, name) for name in names)
    calls: dict[str, Callable[[], Any]] = {
        "gather": lambda: gather(whole, part),
        "divide": lambda: divide(part, whole),
        "sum": lambda: dist.all_reduce(whole),
    }
    return _time(calls[kind], device)


def _copied(size: int) -> float:
    """1e9 bytes a second from the first GPU to the second one, by a copy without NCCL."""
    here, there = (torch.zeros(size // 4, device=f"cuda:{i}") for i in (0, 1))
    return size / _time(lambda: there.copy_(here), here.device, there.device) / 1e9


def _time(call: Callable[[], Any], *devices: torch.device) -> float:
    def wait() -> float:
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    each = []
    for _ in range(REPEATS):
        began = wait()
        call()
        each.append(wait() - began)
    return median(each)


def topology() -> list[str]:
    """The rows of `nvidia-smi topo -m` that are of GPUs, with the columns that are."""
    said = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True).stdout
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines() if line.startswith("GPU")]
    return [" ".join(row[: 1 + len(rows)]) for row in rows]


def transport(log: Path) -> list[str]:
    """By which ways NCCL says that the GPUs exchange: P2P/CUMEM over NVLink or PCI Express, SHM through the host's
    memory."""
    if not log.exists():
        return []
    return sorted(set(re.findall(r" via (\S+)", log.read_text(errors="replace"))))


def told(found: dict[str, Any]) -> list[str]:
    """For people."""
    names = {True: "peers reach each other's memory", False: "no peer access", None: "peer access not known"}
    lines = [f"link: {names[found['peer']]}; NCCL goes by {', '.join(found['transport']) or 'an unknown way'}"]
    lines += found["topology"]
    for row in found["rates"]:
        lines.append(f"{row['kind']:<8}{row['bytes'] / 2**20:>8,.2f} MiB {row['seconds'] * 1e3:>9.3f} ms"
                     f" {row['gb_per_second']:>8.2f} GB/s")  # fmt: skip
    if found["copy_gb_per_second"]:
        lines.append(f"copy from GPU to GPU {found['copy_gb_per_second']:.2f} GB/s")
    return [*lines, *([found["reason"]] if found["reason"] else [])]
