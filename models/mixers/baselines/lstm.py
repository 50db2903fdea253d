"""The LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers, Schmidhuber and Cummins 2000).

        i, f, o = sigmoid(x W + h W' + c)  each,    g = tanh(x W + h W' + c)
        c_t     = f * c_{t-1} + i * g ,    h_t = o * tanh(c_t) ,    y = h W_o

What a gate does to a token depends on the vector h before it, by a product with a matrix. So there is no parallel form
in T: the tokens of a document come one after another, in torch's LSTM, which on a GPU is cuDNN's. Its gates stand in
torch's order, i, f, g, o. The forget gate begins open, with a bias of 1 (Jozefowicz, Zaremba and Sutskever 2015).

Shapes: B batch, T tokens, D model width, W width of h and c, N documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from models.mixers.baselines.baseline import Baseline, Held, apart, starts


class LSTM(Baseline):
    """The layer above. width: W, None for D."""

    def __init__(self, hidden_size: int, layer_index: int, width: int | None = None, backend: str = "auto") -> None:
        super().__init__(hidden_size, layer_index, backend)
        if width is not None and width < 1:
            raise ValueError(f"width={width} must be at least 1, or null for the model's")
        self.width = width or hidden_size
        self.cell = nn.LSTM(hidden_size, self.width, batch_first=True)
        with torch.no_grad():  # torch adds two biases; together they are 1 for the forget gate, else 0
            for bias in self._parameters_of_cell()[2:]:
                bias.copy_(0.5 * (torch.arange(4 * self.width) // self.width == 1))
        self.output = nn.Linear(self.width, hidden_size, bias=False)

    def parallel(self, x: Tensor, held: Held | None, segments: Tensor | None) -> tuple[Tensor, Held]:
        given, (h, c) = self._begin(x, held)
        with torch.autocast(x.device.type, enabled=False):
            y, (h, c) = self._documents(given, h, c, segments)
        return self.output(y.to(x.dtype)), (h, c)

    @torch.compiler.disable  # as torch does with its LSTM, which a compiler leaves alone
    def _documents(self, x: Tensor, h: Tensor, c: Tensor, segments: Tensor | None) -> tuple[Tensor, Held]:
        """x [B, T, D] and the state [B, W] of each row: y [B, T, W] and the last state."""
        if segments is None:
            y, (h, c) = self.cell(x, (h.unsqueeze(0).contiguous(), c.unsqueeze(0).contiguous()))
            return y, (h[0], c[0])
        each = apart(segments)
        rows = pack_padded_sequence(each.rows(x), each.lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, (h, c) = self.cell(rows, (each.begun(h).unsqueeze(0), each.begun(c).unsqueeze(0)))
        y, _ = pad_packed_sequence(y, batch_first=True)
        return each.tokens(y, x), (h[0, each.last], c[0, each.last])

    def recurrent(self, x: Tensor, held: Held | None, segments: Tensor | None) -> tuple[Tensor, Held]:
        given, (h, c) = self._begin(x, held)
        begins, outputs, (from_x, from_h, bias, other) = starts(segments), [], self._parameters_of_cell()
        with torch.autocast(x.device.type, enabled=False):
            for t in range(x.shape[1]):
                if begins is not None:
                    h, c = (y.masked_fill(begins[:, t : t + 1], 0) for y in (h, c))
                gates = F.linear(given[:, t], from_x, bias) + F.linear(h, from_h, other)
                i, f, g, o = gates.chunk(4, dim=-1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
        return self.output(torch.stack(outputs, dim=1).to(x.dtype)), (h, c)

    def _begin(self, x: Tensor, held: Held | None) -> tuple[Tensor, Held]:
        """The input and the state in the dtype of the weights: what is added up over a text is not rounded to less."""
        dtype = self._parameters_of_cell()[0].dtype
        h, c = (x.new_zeros(len(x), self.width) for _ in "hc") if held is None else held
        return x.to(dtype), (h.to(dtype), c.to(dtype))

    def matrices(self) -> list[nn.Parameter]:
        return self._parameters_of_cell()[:2]

    def _parameters_of_cell(self) -> list[nn.Parameter]:
        """W and W' [4 W, *], and a bias [4 W] for each."""
        return [getattr(self.cell, name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")]

    def flops_per_token(self, seq_len: int) -> int:
        return 2 * sum(w.numel() for w in (*self.matrices(), self.output.weight))

    def state_size(self, seq_len: int) -> int:
        return 2 * self.width
