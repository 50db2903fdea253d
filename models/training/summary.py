"""What is printed, and what is not: before the first step the model, and who computes it."""

from __future__ import annotations

import logging
import warnings
from itertools import groupby

import torch
from lightning.pytorch.utilities import rank_zero_only

from models.block import InPlace
from models.language_model import LanguageModel
from models.mixers.baselines import Baseline
from models.mixers.mixer import Mixer


def summary(model: LanguageModel, seq_len: int, device: torch.device, dtype: torch.dtype) -> str:
    """Several lines, for people. device and dtype are those of the products during training."""
    embedding = model.embedding.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    forward = model.flops_per_token(seq_len)
    lines = [
        f"model     {total:,} parameters: {total - embedding:,} and {embedding:,} in the embedding"
        + (" (tied to the head)" if model.config.tie_embeddings else ""),
        f"          {3 * forward:,} FLOPs a token to train",
        f"{'layers':<10}{'mixer':<14}{'regressor':<12}{'parameters':>12}{'feed-forward':>14}{'state':>12}  backend",
    ]
    names, fitted, widened, made = model.config.layers, [], [], []
    for key, group in groupby(range(len(names)), key=lambda i: names[i]):
        indices = list(group)
        block = model.blocks[indices[0]]
        mixer = block.mixer
        who = mixer if isinstance(mixer, Baseline) else mixer.regressor
        choice = who.choose(device, dtype)
        layers = f"{indices[0]}" if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        inner = block.feed_forward.inner_size
        lines.append(
            f"{layers:<10}{key:<14}{type(who).__name__:<12}{mixer.num_params:>12,}{inner:>14,}"
            f"{block.state_size(seq_len):>12,}  {choice.backend}{f' ({choice.reason})' if choice.reason else ''}"
        )
        for each in (part for part in mixer.modules() if isinstance(part, Mixer)):
            if device.type == "cuda" or each.pairs_backend != "auto":
                by = each.choose(device, dtype)
                made.append(f"{key}: {by.backend}{f' ({by.reason})' if by.reason else ''}")
        if not isinstance(mixer, Baseline):  # one class has many members, so the memory's own words as well
            fitted.append(f"{key}: {mixer.regressor.function_class}, {mixer.regressor.fit}")
        if isinstance(block.feed_forward, InPlace):
            fitted.append(f"feed-forward: linear, gradient step for {block.feed_forward.grad_batch} pairs")
        if not isinstance(mixer, Baseline) and mixer.features.width != mixer.key_dim:
            widened.append(f"{key}: {type(mixer.features).__name__}, {mixer.features.width:,} of {mixer.key_dim}")
    first = model.blocks[0].feed_forward
    if isinstance(first, InPlace) and first.grad_batch >= seq_len:
        lines.append(
            f"warning: model.feed_forward_grad_batch={first.grad_batch}: a layer that steps behind a mini-batch learns "
            f"nothing within {seq_len} tokens"
        )
    if fitted:
        lines.append(f"(memories: {'; '.join(dict.fromkeys(fitted))})")
    if widened:
        lines.append(f"(features of keys: {'; '.join(dict.fromkeys(widened))})")
    if made:
        lines.append(f"(queries, keys and values of a projection: {'; '.join(dict.fromkeys(made))})")
    lines.append(f"(state: numbers held per sequence after {seq_len:,} tokens)")
    return "\n".join(lines)


@rank_zero_only
def say(text: str) -> None:
    if text:
        print(text, flush=True)


def quiet() -> None:
    """Leaves out what Lightning says about the machine, which the summary does, and warnings about what is meant so."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # inside lightning 2.6, about torch
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged has been summed over the ranks
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # num_workers is a setting
