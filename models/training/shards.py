"""The tensors of a checkpoint, divided among devices as the parameters are (torch.distributed.checkpoint).

checkpoints/step-000000020.shards/      a file a device, and .metadata, which says what is where
            step-000000020.ckpt         all else of the checkpoint, and that its tensors are beside it

Any number of devices and any strategy reads them. background.py writes them.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

SHARDED = "sharded"  # the key of a checkpoint's file that says so


def shards_of(path: Path) -> Path:
    """The folder beside a checkpoint's file."""
    return path.with_suffix(".shards")


def parts(model: nn.Module) -> dict[str, Any]:
    """Of the weights what this rank has, on the CPU."""
    return get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))


def parts_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Of an optimizer's state the same. Parameters have their names in it."""
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(cpu_offload=True))


def flat(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the weights and of the optimizers' states, by the names that they have in the shards."""
    for name, x in checkpoint["state_dict"].items():
        yield f"weights/{name}", x
    for i, state in enumerate(checkpoint["optimizer_states"]):
        for name, values in state["state"].items():
            for key, x in values.items():
                yield f"optimizer {i}/{name}/{key}", x


def nested(checkpoint: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts them back to where `flat` found them; an optimizer's state then has numbers for its parameters, as torch has
    it."""
    numbers = []
    for state in checkpoint["optimizer_states"]:
        names = [name for group in state["param_groups"] for name in group["params"]]
        numbers.append({name: i for i, name in enumerate(names)})
        for group in state["param_groups"]:
            group["params"] = [numbers[-1][name] for name in group["params"]]
    for key, x in tensors.items():
        kind, *place = key.split("/")
        if kind == "weights":
            checkpoint["state_dict"]["/".join(place)] = x
        else:
            i, (name, value) = int(kind.split()[1]), place
            checkpoint["optimizer_states"][i]["state"].setdefault(numbers[i][name], {})[value] = x


# Modules, and names in modules, that .metadata may hold.
KNOWN = frozenset(
    [
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.serialization._get_layout",
        "torch.Size",
        *(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)),
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ]
)


class Reader(dcp.FileSystemReader):
    """torch's, which reads .metadata by pickle, as whatever that says that it is: here as nothing that runs code."""

    def read_metadata(self, *arguments: Any, **settings: Any) -> dcp.Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            _Known(file).load()
        return super().read_metadata(*arguments, **settings)


class _Known(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not {module, f"{module}.{name}"} & KNOWN:
            raise pickle.UnpicklingError(f"a checkpoint's .metadata asks for {module}.{name}, which has no place in it")
        return super().find_class(module, name)


def read_whole(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """`checkpoint`, the file's own content, with all tensors whole."""
    reader = Reader(shards_of(path))
    sizes: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(kept.size, dtype=kept.properties.dtype) for key, kept in sizes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    nested(checkpoint, tensors)
    return checkpoint


def read_parts(checkpoint: dict[str, Any], path: Path, model: nn.Module) -> dict[str, Any]:
    """The same, of every tensor what this rank has of the parameter; the model's weights are given to it at once."""
    reader, here = Reader(shards_of(path)), dict(model.named_parameters())
    sizes: dict[str, Any] = reader.read_metadata().state_dict_metadata
    weights: dict[str, Any] = get_model_state_dict(model)
    tensors: dict[str, Tensor] = {f"weights/{name}": x for name, x in weights.items()}
    for key, kept in sizes.items():
        if not key.startswith("weights/"):
            like = here[key.split("/")[1]]
            same = like.shape == kept.size
            tensors[key] = (
                torch.zeros_like(like.detach()) if same else torch.zeros(kept.size, dtype=kept.properties.dtype)
            )
    dcp.load(tensors, storage_reader=reader)
    nested(checkpoint, tensors)
    return checkpoint
