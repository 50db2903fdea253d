"""A model that says a whole sequence again from its last token's state: what a memory keeps of all that it has seen.

    h = blocks(x)_T ,    y_t = head(decoder(h + sinusoids(t))) ,    decoder: twice norm, linear, gelu

As MAD's autoencoder has it, for its compression task (Poli et al. 2024, appendix B; mad-lab,
mad/model/auto_encoder.py). Everything but what the head reads is the language model's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.cache import Cache
from models.language_model import LanguageModel, LanguageModelConfig
from models.mixers.layer import State
from models.parts.norm import RMSNorm


class Reconstruction(LanguageModel):
    """A language model of which only the last position is decoded, to all of them."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        layer = [
            part for _ in range(2) for part in (RMSNorm(D, config.norm_eps), nn.Linear(D, D, bias=False), nn.GELU())
        ]
        self.decoder = nn.Sequential(*layer, RMSNorm(D, config.norm_eps))
        self.init_weights_by_depth()

    def hidden(
        self, input_ids: Tensor, segments: Tensor | None = None, cache: Cache | None = None, keep: bool = True
    ) -> tuple[Tensor, list[State]]:
        """input_ids [B, T] -> what the head reads, of all T positions, from what is known at the last."""
        x, states = super().hidden(input_ids, segments, cache, keep)
        places = sinusoids(input_ids.shape[1], x.shape[-1], x.device)
        return self.decoder(x[:, -1:] + places.to(x.dtype)), states

    def flops_per_token(self, seq_len: int) -> int:
        return super().flops_per_token(seq_len) + 4 * self.config.hidden_size**2


def sinusoids(length: int, size: int, device: torch.device) -> Tensor:
    """sin and cos of t / 10000^(i / (size / 2 - 1)).  [length, size]"""
    half = size // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=device) / max(1, half - 1))
    angle = torch.arange(length, device=device).unsqueeze(1) * frequency
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, size - 2 * half))
