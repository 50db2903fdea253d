"""Local constant regression on the recent past and on pairs that every query sees.

Problem.    That of constant.py with the Gaussian kernel, on the last W pairs and on N learned ones:
                m_t = argmin_m  sum_{t-W<i<=t} w(q_t, k_i) ||v_i - m||^2 + sum_{j<=N} w(q_t, p_j) ||u_j - m||^2 .
Solution.   Softmax over both, its T x (W + N) weights in one row for each query.
Persistent. p_j and u_j do not depend on the input: what the task asks for, where the window holds what was said
            (Titans, Behrouz et al. 2025, section 3.3, whose learned tokens have keys and values by the layer's own
            projections; here they are learned as keys and values, without the detour; Sukhbaatar et al. 2019). They
            have no position, and no window and no document boundary hides them. No weight has to go to a pair that
            does not deserve it: they are attention sinks too.
State.      The last W - 1 pairs of a sequence, zeros in front where there were fewer: of one size from the first token.
Exactness.  All forms are exact.

Shapes: as in pairs.py; N persistent pairs, C queries of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.precision import working_dtype
from models.parts.sizes import Sizes
from models.regression.local.constant import Softmax, kernel_softmax, local_constant, of_heads
from models.regression.local.pairs import Pairs, View, by_head
from models.regression.regressor import Tokens


def recurrent_sliding_window(q: Tensor, pairs: Pairs, beta: Tensor, view: View, persistent: Pairs) -> Tensor:
    """The definition, one query at a time.

    q [B, T, H, K]; pairs k [B, S, G, K], v [B, S, G, V], of which query t may use what view says, its window included;
    persistent k [1, N, G, K], v [1, N, G, V]; beta [H]. Returns o [B, T, H, V] in the dtype of v. Computed in float32
    at least.
    """
    B, T, H, _ = q.shape
    dtype, outputs = working_dtype(q, pairs.k), []
    k, v, *lasting = (by_head(x, H, dtype) for x in (*pairs[:2], *persistent[:2]))
    lasting = [x.expand(B, -1, -1, -1) for x in lasting]
    with torch.autocast(q.device.type, enabled=False):
        for t in range(T):
            seen = view.reach(slice(t, t + 1))
            if view.start is not None:  # what is another document's in every row is not compared
                seen = slice(max(seen.start, int(view.start[:, t].min())), seen.stop)
            visible = F.pad(view.visible(slice(t, t + 1), seen, q.device), (lasting[0].shape[2], 0), value=True)
            keys, values = (torch.cat([x, y[:, :, seen]], dim=2) for x, y in zip(lasting, (k, v), strict=True))
            query = q[:, t].unsqueeze(2).to(dtype)
            outputs.append(
                local_constant(visible.unsqueeze(1), query, None, keys, values, None, of_heads(beta)).squeeze(2)
            )
    return torch.stack(outputs, dim=1).to(pairs.v.dtype)


def blocked_sliding_window(q: Tensor, pairs: Pairs, beta: Tensor, view: View, persistent: Pairs) -> Tensor:
    """The same by torch's fused kernels, C = min(W, T) queries at a time, each block with its C + W - 1 pairs and the
    persistent ones: memory is linear in T. Arguments as in recurrent_sliding_window; view.past is W - 1.
    """
    (T, H), W = q.shape[1:3], view.past + 1
    C = min(W, T)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -T % C)) for x in (q * beta.to(q.dtype).unsqueeze(-1), *pairs[:2]))
    q = q.unflatten(1, (-1, C)).transpose(2, 3)  # [B, n, H, C, K]
    k, v = (x.unfold(1, C + W - 1, C).transpose(-1, -2) for x in (k, v))  # [B, n, G, C + W - 1, *]
    keys, values = (x.to(q.dtype).transpose(1, 2).unsqueeze(1).expand(*k.shape[:2], -1, -1, -1) for x in persistent[:2])
    visible = F.pad(_visible(view, T, C, q.device), (keys.shape[3], 0), value=True)
    o = F.scaled_dot_product_attention(
        q.flatten(0, 1),
        torch.cat([keys, k], dim=3).flatten(0, 1),
        torch.cat([values, v], dim=3).flatten(0, 1),
        attn_mask=visible.expand(len(q), -1, -1, -1).flatten(0, 1).unsqueeze(1),
        scale=1.0,
        enable_gqa=k.shape[2] != H,
    )
    return o.unflatten(0, (len(q), -1)).transpose(2, 3).flatten(1, 2)[:, :T]


def kernel_sliding_window(q: Tensor, pairs: Pairs, beta: Tensor, view: View, persistent: Pairs) -> Tensor:
    """The same by the kernels of this repository: two weighted means, which the sums of their weights bring together.
    Arguments as in recurrent_sliding_window.
    """
    near, level = kernel_softmax(q, pairs, beta, view)
    if not (N := persistent.k.shape[1]):
        return near
    lasting = Pairs(*(x.expand(len(q), -1, -1, -1) for x in persistent[:2]))
    far, far_level = kernel_softmax(q, lasting, beta, View(past=N - 1))  # every query comes after all of them
    share = (level - far_level).sigmoid().unsqueeze(-1)
    return (far + share * (near.float() - far)).to(near.dtype)


def _visible(view: View, T: int, C: int, device: torch.device) -> Tensor:
    """The blocks' masks [B or 1, n, C, C + W - 1]: pair j of a block is W - 1 + i - j places before its query i."""
    query, pair = torch.arange(C, device=device).unsqueeze(1), torch.arange(C + view.past, device=device)
    itself, near = pair == query + view.past, (pair >= query) & (pair <= query + view.past)
    if view.start is None:
        return near.expand(1, -(-T // C), -1, -1)
    start = F.pad(view.start, (0, -T % C)).unflatten(1, (-1, C)).unsqueeze(-1)  # [B, n, C, 1]
    block = C * torch.arange(start.shape[1], device=device).view(-1, 1, 1)
    return near & ((pair + block >= start) | itself)


class SlidingWindow(Softmax):
    """Softmax over the last `window` pairs, the query's own among them, and `persistent` learned ones, N.

    inverse_temperature: pairs.py. A persistent key begins with length one, as the shell makes the others with qk_norm,
    and is free to grow: it may always count more, or less, than any token.
    """

    window: int

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        inverse_temperature: str | float = "learned",
        window: int = 64,
        persistent: int = 4,
    ) -> None:
        if window is None:
            raise ValueError("regressor.window=null is no window; a positive integer, or regressor=softmax for all")
        if persistent < 0:
            raise ValueError(f"regressor.persistent={persistent} is no number of pairs; 0 for none")
        super().__init__(sizes, backend, "gaussian", inverse_temperature, window)
        G, K, V = sizes.num_kv_heads, sizes.key_dim, sizes.value_dim
        self.persistent_keys = nn.Parameter(F.normalize(torch.randn(persistent, G, K), dim=-1))
        self.persistent_values = nn.Parameter(torch.randn(persistent, G, V))
        self.function_class = "constant around q, window"

    def gather(self, tokens: Tokens, state: Pairs | None) -> tuple[Pairs, View]:
        if state is None:  # as many pairs as there ever are, none of which a query uses
            past, B = self.window - 1, len(tokens.k)
            keys, values = (x.new_zeros(B, past, *x.shape[2:]) for x in (tokens.k, tokens.v))
            state = Pairs(keys, values, torch.full((B,), past, device=tokens.k.device))
        return super().gather(tokens, state)

    def read(self, q: Tensor, pairs: Pairs, view: View) -> Tensor:
        persistent = Pairs(self.persistent_keys.unsqueeze(0), self.persistent_values.unsqueeze(0))
        forms = {
            "recurrent": recurrent_sliding_window,
            "triton": kernel_sliding_window,
            "torch": blocked_sliding_window,
        }
        backend = self.choose(q.device, q.dtype).backend
        form = forms["torch" if q.shape[1] == 1 and backend == "triton" else backend]
        return form(q, pairs, self.beta(q), view, persistent)

    def num_visible(self, seq_len: int) -> int:
        return super().num_visible(seq_len) + len(self.persistent_keys) * seq_len

    def state_size(self, seq_len: int) -> int:
        return (self.window - 1) * self.num_kv_heads * (self.key_dim + self.value_dim)
