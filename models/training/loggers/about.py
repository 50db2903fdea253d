"""What a logger is told of a run beside its config: what was chosen, how large it is, and what computes it."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig

from models.language_model import LanguageModel

MIXER = "mixer@model.mixers."


def about(model: LanguageModel, seq_len: int, origin: dict[str, Any]) -> dict[str, Any]:
    """choice: the option of each group, and the preset of each mixer.  mixer: these in words.  parameters.
    state_size: numbers held for one sequence at its end.  flops_per_token: to train, forward and backward.  And of
    origin.py: command, versions, commit, changed, device.
    """
    return {
        "choice": (chosen := choice()),
        "mixer": _in_words(chosen.get("mixers", {})),
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_embedding": model.embedding.weight.numel(),
        "state_size": model.state_size(seq_len),
        "flops_per_token": 3 * model.flops_per_token(seq_len),
        **origin,
    }


def choice() -> dict[str, Any]:
    """Of the command: {"model": "hybrid", "size": "tiny", ..., "mixers": {"attention": "softmax", ...}}."""
    if not HydraConfig.initialized():
        return {}
    chosen = {key: name for key, name in HydraConfig.get().runtime.choices.items() if name is not None}
    mixers = {key.removeprefix(MIXER): name for key, name in chosen.items() if key.startswith(MIXER)}
    groups = {key: name for key, name in chosen.items() if "@" not in key and not key.startswith("hydra/")}
    return groups | {"mixers": mixers}


def _in_words(mixers: dict[str, str]) -> str:
    """gated_delta, or attention=softmax, recurrent=gated_delta; a mixer's own parts are left out."""
    whole = {part: name for part, name in mixers.items() if "." not in part}
    return ", ".join(whole.values() if len(whole) == 1 else (f"{part}={name}" for part, name in sorted(whole.items())))
