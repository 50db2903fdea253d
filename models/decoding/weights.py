"""The weights of a step: where autocast would cast a matrix at every token, a copy that is made once.

A captured step reads the parameters where they are, so that a change of those in place is seen at once; copies are made
anew when the parameters' versions differ, and where another text begins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.decoding.fused import FusedBlock, FusedMixer
from models.parts.precision import HALF

Stamp = tuple[tuple[int, int], ...]


class Weights:
    """copies: name -> the weight or bias of a linear layer in the dtype of autocast; those that a fused mixer has in
    its own product are not among them. dtype None: without autocast.
    """

    def __init__(self, model: nn.Module, blocks: list[FusedBlock], dtype: torch.dtype | None) -> None:
        self.places = [
            (holder, name, x)
            for module in model.modules()
            for holder in (module._modules, module._parameters, module._buffers)
            for name, x in holder.items()
        ]
        self.tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self.mixers: list[FusedMixer] = [block.mixer for block in blocks if block.refusal is None]
        own = {id(source) for mixer in self.mixers for source in mixer.sources}
        self.sources: dict[str, Tensor] = {}
        for name, layer in model.named_modules():
            if type(layer) is nn.Linear and dtype is not None:
                given = {"weight": layer.weight, "bias": layer.bias}
                self.sources |= {
                    f"{name}.{kind}": x
                    for kind, x in given.items()
                    if x is not None and id(x) not in own and x.dtype in (torch.float32, *HALF) and x.dtype != dtype
                }
        self.copies = {name: x.detach().to(dtype) for name, x in self.sources.items()}
        self.stamp = self.now()

    def now(self) -> Stamp:
        """Where the parameters are, and how often each was changed in place."""
        return tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in self.tensors)

    def refresh(self) -> None:
        for name, x in self.copies.items():
            x.copy_(self.sources[name])
        for mixer in self.mixers:
            mixer.refresh()
        self.stamp = self.now()

    @property
    def moved(self) -> bool:
        """Whether a layer or a tensor of the model is another than it was, or elsewhere in memory."""
        return any(holder.get(name) is not x for holder, name, x in self.places) or any(
            x.data_ptr() != place for x, (place, _) in zip(self.tensors, self.stamp, strict=True)
        )
