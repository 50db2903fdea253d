"""Which parameters decay, and the optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.language_model import LanguageModel
from models.mixers.baselines import Baseline
from models.mixers.mixer import Mixer
from models.parts.orthogonal import orthogonal
from models.regression.regressor import Regressor


def parameter_groups(model: LanguageModel, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, in the order of the model: weights that decay and the rest. Together they hold every parameter once,
    which is asserted.

    What decays are the matrices of the products between layers. Embeddings (and a head tied to them), norms, biases,
    convolutions, and everything that sets a decay or a step size do not: pulling those towards zero changes what the
    memory is, not how large the weights are.
    """
    spared = {id(model.head.weight), id(model.embedding.weight)}
    for mixer in (m for m in model.modules() if isinstance(m, Mixer)):
        for part in (mixer.decay, mixer.features, mixer.regressor):
            spared.update(id(p) for p in part.parameters())
    decayed = {
        id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in spared
    }
    decayed |= {id(p): p for m in model.modules() if isinstance(m, Baseline) for p in m.matrices()}
    rest = {id(p): p for p in model.parameters() if id(p) not in decayed}
    everything = {id(p) for p in model.parameters() if p.requires_grad}
    assert decayed.keys() | rest.keys() == everything, "a parameter is in no group"
    assert not decayed.keys() & rest.keys(), "a parameter is in two groups"
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(rest.values()), "weight_decay": 0.0},
    ]


def clip(parameters: list[nn.Parameter], most: float, norm: Tensor, length: float) -> None:
    """Shortens gradients of this norm to `most`, as torch does, by min(1, most / (norm + 1e-6)). length: the norm, as
    the host knows it. Where that leaves the gradients as they are, nothing passes over them."""
    if length + 2e-6 > most * (1 - 1e-6) or not math.isfinite(length):  # a float32 may round the factor to less than 1
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)


def adamw(
    model: LanguageModel,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with parameter_groups, in one fused kernel."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=(*betas,), eps=eps, fused=True)


def muon(
    model: LanguageModel,
    lr: float,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> MuonAdamW:
    """Muon for the matrices between vectors of the model, AdamW for the rest, at one learning rate.

    Those are what decays in parameter_groups, and a regressor's own `projections`, which so decay too. Not among them
    are filters of convolutions, which are a row of numbers for each channel; gates, decays and step sizes, a vector for
    each head; embeddings, persistent keys and values and landmarks, which are points; and what belongs to the inner
    model, a memory's first weights and its features.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"optimizer.momentum={momentum} must be at least 0 and below 1")
    matrices, rest = parameter_groups(model, weight_decay)
    regressors = [m for m in model.modules() if isinstance(m, Regressor)]
    own = {id(getattr(r, name).weight) for r in regressors for name in r.projections}
    matrices["params"] += [p for p in rest["params"] if id(p) in own]
    rest["params"] = [p for p in rest["params"] if id(p) not in own]
    return MuonAdamW([{**matrices, "momentum": momentum}, rest], lr=lr, betas=(*betas,), eps=eps, fused=True)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for the groups that have a `momentum`: one optimizer, so one clip, one schedule and one state.

    Muon (Jordan et al. 2024) sets all singular values of a matrix's averaged gradient to about one, so that every
    direction learns at the same pace; times 0.2 sqrt(larger side), an update is as long as AdamW's, and one learning
    rate does for both (Liu et al. 2025, section 2.2):

        M <- mu M + G ,    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonal(G + mu M) .

    Of several processes each makes a part of the matrices orthogonal, and gets the others' (as Liu et al. 2025, section
    2.3, divide the work).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "momentum" in group:
                self._step_matrices(group)
        super().step()  # passes over what has no gradient any more
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        for shape, params in by_shape.items():  # matrices of one shape go through the products together
            own, directions = share(len(params)), []
            for i, p in enumerate(params):
                state, gradient = self.state[p], p.grad
                assert gradient is not None
                if not state:
                    state["step"], state["average"] = torch.zeros(()), torch.zeros_like(p)  # AdamW looks for a step
                average = state["average"].mul_(group["momentum"]).add_(gradient)
                direction = gradient.add(average, alpha=group["momentum"])
                direction = direction.full_tensor() if isinstance(direction, DTensor) else direction
                directions += [direction] if i in own else []
            length = 0.2 * max(shape) ** 0.5
            for p, update in zip(params, of_all(directions, params, own), strict=True):
                if isinstance(p, DTensor):
                    update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * length)
                p.grad = None


def share(count: int) -> range:
    """Which of so many matrices this process makes orthogonal: as many as each other one, but for the last ones."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    each = -(-count // world)
    return range(rank * each, min(count, (rank + 1) * each))


def of_all(directions: list[Tensor], params: list[Tensor], own: range) -> list[Tensor]:
    """The orthogonal matrices of all processes, each computed by one of them; in bfloat16 on a GPU, as computed."""
    made = orthogonal(torch.stack(directions)) if directions else None
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert made is not None
        return list(made)
    like, world = params[0], dist.get_world_size()
    dtype = torch.bfloat16 if like.is_cuda else like.dtype
    mine = torch.zeros(-(-len(params) // world), *like.shape, dtype=dtype, device=like.device)
    if made is not None:
        mine[: len(own)] = made
    each = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(each, mine)
    return [x.to(like.dtype) for x in torch.cat(each)[: len(params)]]
