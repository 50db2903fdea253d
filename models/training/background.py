"""A checkpoint of which every device writes its own part, in the background while training goes on.

Training waits until the tensors are copied to the CPU. A thread then writes the shards (shards.py), and at the end the
first rank gives step-N.ckpt its name, after the checksums of all files. Until then there is no checkpoint of that step:
what a kill leaves of its shards is removed when the run goes on.
"""

from __future__ import annotations

import shutil
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from models.training.checkpoint import WholeFiles, sha256, sync_folder
from models.training.shards import SHARDED, flat, shards_of


class ShardedFiles(WholeFiles):
    """To be made by all ranks together."""

    background = True

    def __init__(self, device: torch.device) -> None:
        self.on_a_cpu = device.type == "cpu"  # where to offload a tensor to the CPU copies nothing
        self.group = dist.new_group(backend="gloo")  # the thread's own
        self.thread: threading.Thread | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Begins. The state dicts of `checkpoint` hold this rank's parts, on the CPU (shards.py)."""
        assert self.thread is None, "the one before was not waited for"
        path, self.error = Path(path), ""
        # the next step changes what is no copy; an optimizer counts its steps on the CPU
        tensors = {name: x.clone() if self.on_a_cpu or x.ndim == 0 else x for name, x in flat(checkpoint)}
        rest = checkpoint | {"state_dict": {}, SHARDED: True}
        rest["optimizer_states"] = [state | {"state": {}} for state in checkpoint["optimizer_states"]]
        rest = deepcopy(rest)
        if dist.get_rank() == 0:
            shutil.rmtree(shards_of(path), ignore_errors=True)
        dist.barrier(self.group)
        self.thread = threading.Thread(target=self._write, args=(tensors, rest, path), daemon=True)
        self.thread.start()

    def finish(self) -> str:
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        return self.error

    def _write(self, tensors: dict[str, Tensor], rest: dict[str, Any], path: Path) -> None:
        try:
            self._write_all(tensors, rest, path)
        except Exception as error:  # which a thread would keep to itself: `finish` tells it
            self.error = reason(error)

    def _write_all(self, tensors: dict[str, Tensor], rest: dict[str, Any], path: Path) -> None:
        folder, rank, said = shards_of(path), dist.get_rank(), ""
        mine: dict[str, str] = {}
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=self.group)
            own = [*folder.glob(f"__{rank}_*"), *(folder.glob(".metadata") if rank == 0 else [])]
            mine = {f"{folder.name}/{file.name}": sha256(file) for file in own}
        except (OSError, dcp.CheckpointException) as error:
            said = reason(error)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, said), group=self.group)
        failed = [why for _, why in everyone if why]
        if rank == 0 and not failed:
            sync_folder(folder)
            super().save_checkpoint(
                rest, path, {name: digest for found, _ in everyone for name, digest in found.items()}
            )
        elif failed:
            self.error = failed[0]
            shutil.rmtree(folder, ignore_errors=True)


def reason(error: BaseException) -> str:
    """Of a failed write, the first rank's."""
    failures = getattr(error, "failures", {})
    first: Any = next((found[0] if isinstance(found, tuple) else found for found in failures.values()), error)
    return getattr(first, "strerror", None) or str(first) or repr(first)
