"""The long convolution: in each channel one filter as long as the sequence, the same for every text (Fu et al. 2023,
Simple Hardware-Efficient Long Convolutions).

        f   = sign(w) * max(|w| - threshold, 0)                      w [D, L], what is nearly zero becomes it
        c_t = sum_{j<L} f_j * x_{t-j} + skip * x_t ,    x_i = 0 before the document's first token
        y   = a * sigmoid(b) ,    a, b = gelu(c) W

The parallel form multiplies spectra (FFT), in T log T. It is causal but for rounding: what comes later changes a
number by some 1e-16 of the row's largest. Decoding is the definition: one product of the filter with the last L tokens,
of which L - 1 are the state.

Where weights of the past depend on how long ago it was, and on nothing else, a token can't be found by what it is.

Shapes: B batch, T tokens, D model width, L length of the filter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mixers.baselines.baseline import Baseline, Held, apart
from models.parts.precision import wide


class LongConv(Baseline):
    """The layer above. length: L, in tokens; what is longer ago is not seen. threshold: of the squashing.

    Filters begin as noise that fades, from a channel that sees all of L to one that sees 2 L / D tokens (the paper's
    appendix, and "double_exp" in the authors' code).
    """

    def __init__(
        self, hidden_size: int, layer_index: int, length: int, threshold: float = 0.001, backend: str = "auto"
    ) -> None:
        super().__init__(hidden_size, layer_index, backend)
        if length < 2:
            raise ValueError(f"length={length} must be at least 2 tokens")
        if threshold < 0:
            raise ValueError(f"threshold={threshold} must be at least 0")
        self.length, self.threshold = length, threshold
        rates = (hidden_size / 2) ** (torch.arange(hidden_size) / hidden_size)
        fades = torch.exp(-rates.unsqueeze(1) * torch.arange(length) / length)
        self.weight = nn.Parameter(0.02 * torch.randn(hidden_size, length) * fades)
        self.skip = nn.Parameter(torch.randn(hidden_size))
        self.output = nn.Linear(hidden_size, 2 * hidden_size)

    @property
    def filter(self) -> Tensor:
        """f [D, L]."""
        return F.softshrink(wide(self.weight), self.threshold)

    def parallel(self, x: Tensor, held: Held | None, segments: Tensor | None) -> tuple[Tensor, Held]:
        if x.shape[1] == 1 and held is not None:
            return self.recurrent(x, held, segments)
        padded, documents = self._after(x, held, segments)
        with torch.autocast(x.device.type, enabled=False):
            c = self._by_documents(wide(padded), documents)[:, -x.shape[1] :]
        return self._leave(x, c), self._kept(padded, documents)

    def recurrent(self, x: Tensor, held: Held | None, segments: Tensor | None) -> tuple[Tensor, Held]:
        padded, documents = self._after(x, held, segments)
        T, seen, found = x.shape[1], padded.shape[1] - x.shape[1], []
        with torch.autocast(x.device.type, enabled=False):
            backwards = self.filter.flip(1).unsqueeze(-1)  # [D, L, 1]
            for t in range(seen, seen + T):
                now = slice(max(0, t + 1 - self.length), t + 1)
                window = wide(padded[:, now])
                if documents is not None:
                    window = window.masked_fill((documents[:, now] != documents[:, t : t + 1]).unsqueeze(-1), 0)
                found.append((window.permute(2, 0, 1) @ backwards[:, -window.shape[1] :]).squeeze(-1).T)
        return self._leave(x, torch.stack(found, dim=1)), self._kept(padded, documents)

    def _after(self, x: Tensor, held: Held | None, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens behind those of the calls before, which belong to the first document; and each one's document."""
        if held is None:
            return x, segments
        padded = torch.cat([held[0].to(x.dtype), x], dim=1)
        if segments is None:
            return padded, None
        return padded, torch.cat([segments[:, :1].expand(-1, self.length - 1), segments], dim=1)

    @torch.compiler.disable  # complex numbers, which a compiler leaves alone, and documents of any number
    def _by_documents(self, x: Tensor, documents: Tensor | None) -> Tensor:
        """c without its skip, [B, T, D], by spectra of each document."""
        if documents is None:
            return self._convolved(x)
        each = apart(documents)
        return each.tokens(self._convolved(each.rows(x)), x)

    def _convolved(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        reach = min(T, self.length)
        size = T + reach  # so much that what goes around meets nothing
        spectrum = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(self.filter[:, :reach], n=size).T
        return torch.fft.irfft(spectrum, n=size, dim=1)[:, :T]

    def _kept(self, padded: Tensor, documents: Tensor | None) -> Held:
        """The last L - 1 tokens, zero where they are of another document than the last, or before the first."""
        missing = self.length - 1 - padded.shape[1]
        tail = padded[:, max(0, -missing) :]
        if documents is not None:
            tail = tail.masked_fill((documents[:, max(0, -missing) :] != documents[:, -1:]).unsqueeze(-1), 0)
        return (F.pad(tail, (0, 0, max(0, missing), 0)),)

    def _leave(self, x: Tensor, c: Tensor) -> Tensor:
        c = (c + wide(self.skip) * wide(x)).to(x.dtype)
        return F.glu(self.output(F.gelu(c)), dim=-1)

    def flops_per_token(self, seq_len: int) -> int:
        """The products with W, and those of the definition, which grow with what has been seen. Spectra take fewer."""
        seen = sum(min(t + 1, self.length) for t in range(seq_len)) / seq_len
        return 2 * self.output.weight.numel() + round(2 * self.hidden_size * seen)

    def state_size(self, seq_len: int) -> int:
        return self.hidden_size * (self.length - 1)
