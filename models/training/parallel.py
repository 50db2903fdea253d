"""What the processes of a run exchange about its parameters: strategy=ddp, fsdp and hsdp (conf/strategy).

    ddp    each has all of the model, and gradients are averaged
    fsdp   each has a part of every parameter, of its gradient and of the optimizer's state: FSDP2, ZeRO
           (Rajbhandari et al. 2020)
    hsdp   so within groups, the replicas, which have all of the model each and average gradients

`reduction` is the precision in which gradients are added up over processes: float32, or bfloat16 for half the traffic.
Nothing is exchanged between the micro-batches of a step that needs not be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from models.training.background import ShardedFiles
from models.training.captured import refusal
from models.training.meeting import meet
from models.training.shards import SHARDED, parts, parts_of, read_parts

PIECE = 2**26  # gradients that are averaged by one call: 256 MiB in float32
REDUCTIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WHOLE_FOR = ("auto", "block", "pass", "step")
MUCH = 1 / 3  # of a GPU's memory: with no more for parameters, gradients and state, auto holds them whole for a step


class DDP(DDPStrategy):
    """Copies of the model, gradients averaged.

    Where a micro-batch is one CUDA graph (captured.py), nothing meets in it: gradients are averaged after a step's
    last one, all together, which takes milliseconds of a step. So it is with reduction=bfloat16, and where processes
    share their sequences: a sum that waits for a process would run beside a message that this one waits for, and NCCL
    promises no progress to two groups at a time. Elsewhere torch's DistributedDataParallel does it, while the last
    micro-batch is in its backward pass; bucket_mb: of gradients, that it averages at a time.
    """

    averages = True  # what captured.py asks

    def __init__(self, reduction: str = "float32", bucket_mb: int = 25, **settings: Any) -> None:
        super().__init__(bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True, **settings)
        self.dtype = one_of("trainer.strategy.reduction", reduction, REDUCTIONS)
        self.at_the_end = False

    def setup_environment(self) -> None:
        meet()
        super().setup_environment()

    def configure_ddp(self) -> None:
        module: Any = self.lightning_module
        graph = module.cuda_graph and refusal(module.trainer, module.context_parallel) is None
        self.at_the_end = graph or self.dtype is torch.bfloat16 or module.context_parallel > 1
        if self.at_the_end:
            for x in (*module.parameters(), *module.buffers()):
                dist.broadcast(x.detach(), 0)
            return
        if module.compile_blocks:  # by themselves, so that gradients come block by block: nothing is to be split
            torch._dynamo.config.optimize_ddp = False
        super().configure_ddp()

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Those of a step, in place, where the backward pass has not done it."""
        if not self.at_the_end:
            return
        sums, size = [], dist.get_world_size()
        for part in pieces(gradients):
            flat = torch.cat([x.reshape(-1) for x in part]).to(self.dtype).div_(size)
            sums.append((part, flat, dist.all_reduce(flat, async_op=True)))
        for part, flat, sent in sums:
            sent.wait()
            found = flat.split([x.numel() for x in part])
            torch._foreach_copy_(list(part), [y.view_as(x) for x, y in zip(part, found, strict=True)])


def pieces(tensors: Iterable[Tensor], most: int = PIECE) -> Iterator[list[Tensor]]:
    """One after the other, as many as have `most` elements together, and at least one."""
    part: list[Tensor] = []
    for x in tensors:
        if part and sum(y.numel() for y in part) + x.numel() > most:
            yield part
            part = []
        part.append(x)
    if part:
        yield part


class Sharded(ModelParallelStrategy):
    """Parameters, gradients and the optimizer's state, divided among the devices of a replica.

    replicas: how many; a divisor of the number of devices.
    whole_for: how long a device holds parameters whole that it has gathered. `block`: one block's pass, forward, and
        again backward (ZeRO-3). `pass`: a micro-batch, forward and backward. `step`: all micro-batches of a step, and
        gradients whole as well, which are then divided once; this takes 8 bytes a parameter, and sends least. `auto`:
        a step where a GPU has that memory, else a block.
    checkpoint: `whole`, one file that the first rank writes while training waits; or `sharded` (background.py).
    """

    files: ShardedFiles | None = None

    def __init__(
        self, reduction: str = "float32", whole_for: str = "block", replicas: int = 1, checkpoint: str = "whole"
    ) -> None:
        one_of("trainer.strategy.checkpoint", checkpoint, {"whole": False, "sharded": True})
        self.sharded_files = checkpoint == "sharded"
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.dtype = one_of("trainer.strategy.reduction", reduction, REDUCTIONS)
        one_of("trainer.strategy.whole_for", whole_for, {name: name for name in WHOLE_FOR})
        self.whole_for, self.replicas = whole_for, int(replicas)

    def setup_environment(self) -> None:
        world = self._data_parallel_size = self.num_nodes * self.num_processes
        if self.replicas < 1 or world % self.replicas:
            raise ValueError(f"trainer.strategy.replicas={self.replicas} does not divide the {world} device(s)")
        meet()
        super().setup_environment()
        if self.sharded_files and self.files is None:
            self.files = ShardedFiles(self.root_device)

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module], methods: Sequence[str]) -> None:
        """methods: those of the model by which it is called, beside forward.

        Parameters are gathered in float32 and cast by autocast, product by product: bf16-mixed then means the same
        under every strategy.
        """
        settings: dict[str, Any] = {"mesh": self.mesh(), "mp_policy": MixedPrecisionPolicy(reduce_dtype=self.dtype)}
        if self.whole_for == "auto":
            self.whole_for = self._affordable(sum(p.numel() for p in model.parameters()))
            if self.is_global_zero:
                print(f"shards    parameters are whole for a {self.whole_for} at a time (whole_for=auto)", flush=True)
        at_once = (blocks[-1], model)  # the last block, embedding and head are needed again at once
        for module in (*blocks, model):
            fully_shard(module, reshard_after_forward=self.whole_for == "block" and module not in at_once, **settings)
        for block, after in pairwise(blocks):  # gathered while the one before is computed
            cast("FSDPModule", block).set_modules_to_forward_prefetch([cast("FSDPModule", after)])
        for method in methods:
            register_fsdp_forward_method(model, method)
        self.sharded = cast("FSDPModule", model)

    def _affordable(self, size: int) -> str:
        """What `auto` is, the same for all devices. size: the number of parameters."""
        if self.root_device.type != "cuda":
            return "block"
        memory = torch.tensor(torch.cuda.get_device_properties(self.root_device).total_memory, device=self.root_device)
        dist.all_reduce(memory, dist.ReduceOp.MIN)
        needed = 16 * size * self.replicas // dist.get_world_size() + 8 * size
        return "step" if needed <= MUCH * memory.item() else "block"

    def held_between(self, size: int) -> int:
        """Bytes of the gradients that are whole between the micro-batches of a step. size: as above."""
        return 4 * size if self.whole_for == "step" else 0

    def mesh(self) -> DeviceMesh:
        """Of the devices that share, or replicas by these."""
        if self.replicas == 1:
            return self.device_mesh["data_parallel"]
        shape = self.replicas, dist.get_world_size() // self.replicas
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicas", "shards"))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """Of any strategy. (Lightning takes the numbers by which an optimizer's state names parameters for their places
        in the model. They are places in the optimizer's groups.)"""
        checkpoint = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=True)
        assert self.model is not None
        if SHARDED in checkpoint:
            return self._load_shards(checkpoint, Path(checkpoint_path))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, by_name(state, optimizer, names), options=options)
        return checkpoint

    def _load_shards(self, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        assert self.model is not None
        read_parts(checkpoint, path, self.model)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.files is None:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        return self.files.save_checkpoint(checkpoint, filepath)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        assert self.model is not None
        return parts(self.model) if self.files else self.whole_state_dict()

    def whole_state_dict(self) -> dict[str, Any]:
        """On the first rank, but all take part."""
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        assert self.model is not None
        inner = getattr(optimizer, "optimizer", optimizer)  # Lightning's has torch's in it
        return parts_of(inner, self.model) if self.files else super().optimizer_state(optimizer)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning's, around every micro-batch of a step but the last."""
        self._between(True)
        try:
            yield
        finally:
            self._between(False)

    def _between(self, between: bool) -> None:
        if self.whole_for == "step":
            self.sharded.set_requires_gradient_sync(not between)
            self.sharded.set_reshard_after_backward(not between)
        elif self.replicas > 1:  # within a replica gradients are divided at once, among replicas averaged at the end
            self.sharded.set_requires_all_reduce(not between)


def by_name(state: dict[str, Any], optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """An optimizer's state dict with parameters by their names in the model; `names`: those by the parameters' id."""
    found: dict[Any, str] = {}
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        found |= {number: names[id(p)] for number, p in zip(saved["params"], group["params"], strict=True)}
    groups = [group | {"params": [found[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {found[number]: x for number, x in state["state"].items()}, "param_groups": groups}


def one_of(setting: str, value: str, allowed: dict[str, Any]) -> Any:
    if value not in allowed:
        raise ValueError(f"{setting}={value} is not one of {', '.join(allowed)}")
    return allowed[value]
