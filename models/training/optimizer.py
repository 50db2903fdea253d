"""Which parameters decay, and the optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.language_model import LanguageModel


def parameter_groups(model: LanguageModel, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, in the order of the model: weights that decay and the rest. Together they hold every parameter once,
    which is asserted.

    What decays are the matrices of the products between layers. Embeddings (and a head tied to them), norms, biases,
    convolutions, and everything that sets a decay or a step size do not: pulling those towards zero changes what the
    memory is, not how large the weights are.
    """
    spared = {id(model.head.weight), id(model.embedding.weight)}
    for block in model.blocks:
        for part in (block.mixer.decay, block.mixer.features, block.mixer.regressor):
            spared.update(id(p) for p in part.parameters())
    decayed = {
        id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in spared
    }
    rest = {id(p): p for p in model.parameters() if id(p) not in decayed}
    everything = {id(p) for p in model.parameters() if p.requires_grad}
    assert decayed.keys() | rest.keys() == everything, "a parameter is in no group"
    assert not decayed.keys() & rest.keys(), "a parameter is in two groups"
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(rest.values()), "weight_decay": 0.0},
    ]


def adamw(
    model: LanguageModel,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with parameter_groups, in one fused kernel."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=tuple(betas), eps=eps, fused=True)
