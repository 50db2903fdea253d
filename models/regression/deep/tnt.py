"""TNT: one memory for all of a document, and others beside it that forget where a shard ends.

Problem.    Small mini-batches learn better and are slow, since one waits for the other (Li et al. 2025, TNT, arXiv
            2511.07343). So a memory with large ones keeps what is long ago, and others with small ones what is near.
Solution.   V, Titans' memory of an MLP (mlp.py) with mini-batches of b, and local ones W^(i) with mini-batches of b_i,
            which begin anew at their learned start after every S tokens of a document, a shard (equations 5 to 7):
                o_t = f(q_t; V_t) + sum_i f(P_t q_t; W^(i)_t) ,    P_t = sum_j k_j k_j^T / |k_j|^2 ,
            j the tokens since the local mini-batch began: a local memory knows no other keys, and is asked along them.
            A shard is a document to a local memory, so that shards run side by side where documents do.
State.      That of every memory, P of every local one, and the place in the shard.
Members.    No local memories: titans_mlp. S infinite and no P: a sum of memories with mini-batches of their own.
Here.       All memories read their own writes, which the paper's V reads a mini-batch later. The paper trains on with
            b_i = 1 at the end; here that is another setting of a model, to go on with from a checkpoint.

Shapes: B batch, T tokens, H heads, K key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.parts.precision import NOTHING, wide
from models.parts.sizes import Sizes
from models.regression.deep import forms
from models.regression.deep.mlp import DeepMemory
from models.regression.deep.rules import each
from models.regression.documents import positions
from models.regression.linear.linear import chunked_linear, recurrent_linear
from models.regression.memory import Memory
from models.regression.regressor import FORGET, Tokens


class State(NamedTuple):
    """memory: V's. local: of every W. keys: of every P, [B, H, K, K]. place [B]: in the shard, of the next token."""

    memory: forms.State
    local: tuple[forms.State, ...]
    keys: tuple[Tensor, ...]
    place: Tensor


class TNT(Memory):
    """The layer above.

    grad_batch: b.  local_batches: b_i of every local memory, each at most `shard`, S.  project: false reads local
    memories at q_t.  The rest is DeepMemory's, the same for all memories.
    """

    weighs_values = False

    def __init__(
        self,
        sizes: Sizes,
        backend: str = "auto",
        chunk: int | None = None,
        grad_batch: int = 64,
        local_batches: Sequence[int] = (16,),
        shard: int = 512,
        project: bool = True,
        depth: int = 2,
        expansion: float = 4.0,
        activation: str = "silu",
        inner_optimizer: str = "momentum",
        remat: int = 8,
    ) -> None:
        super().__init__(sizes, backend, chunk)
        if not isinstance(local_batches, Sequence) or any(not 1 <= b <= shard for b in local_batches):
            raise ValueError(
                f"regressor.local_batches={local_batches} must be a list of numbers of tokens, each at most the "
                f"shard={shard}"
            )
        settings: dict[str, Any] = {"inner_optimizer": inner_optimizer, "remat": remat, "activation": activation}

        def memory(b: int) -> DeepMemory:
            return DeepMemory(sizes, backend, chunk, b, depth, expansion, **settings)

        self.memory = memory(grad_batch)
        self.local = nn.ModuleList(memory(b) for b in local_batches)
        self.grad_batch, self.shard, self.project = grad_batch, shard, project
        self.accepts_decay, self.function_class = self.memory.accepts_decay, f"{1 + len(self.local)} MLPs"
        self.fit = f"{self.memory.fit}, shards"

    def forward(self, tokens: Tokens, state: State | None = None) -> tuple[Tensor, State]:
        x, q, k, v, log_decay, segments = tokens
        o, memory = self.memory(tokens, None if state is None else state.memory)
        place = positions(k, None if state is None else state.place, segments)[0] % self.shard
        # to local memories a shard is a document; of rows that begin with one and have no other, all side by side
        whole = state is None and segments is None and k.shape[1] % min(self.shard, k.shape[1]) == 0
        times = -(-k.shape[1] // self.shard) if whole else 1
        shards = None if whole else (place == 0).long().cumsum(1)
        begins, local, keys = place[:, 0] == 0, [], []
        for i, W in enumerate(self.memories[1:]):
            before = None if state is None else W.forget(state.local[i], begins)
            asked, P = self._asked(W.grad_batch, q, k, place, None if state is None else state.keys[i])
            given = Tokens(x, asked, k, v, log_decay, shards).each(lambda y: y.unflatten(1, (times, -1)).flatten(0, 1))
            read, after = W(given, before)
            o = o + read.unflatten(0, (-1, times)).flatten(1, 2)
            local.append(each(lambda y: y.unflatten(0, (-1, times))[:, -1], after))
            keys.append(P)
        return o, State(memory, tuple(local), tuple(keys), (place[:, -1] + 1) % self.shard)

    def _asked(self, b: int, q: Tensor, k: Tensor, place: Tensor, P: Tensor | None) -> tuple[Tensor, Tensor]:
        """P_t q_t [B, T, H, K] and the last P: linear attention to the keys of a mini-batch of b."""
        if not self.project:
            return q, k.new_zeros(len(k), 0)
        values = wide(k) / (wide(k).square().sum(-1, keepdim=True) + NOTHING)
        forgets = (FORGET * (place % b == 0)).to(values.dtype).unsqueeze(-1).expand(k.shape[:3])
        if k.shape[1] == 1 or self.backend == "recurrent":
            asked, P = recurrent_linear(q, k, values, forgets, P)
        else:
            asked, P = chunked_linear(q, k, values, forgets, P, min(self.tokens_at_once(k), b))
        return asked.to(q.dtype), P

    def recall(self, x: Tensor, q: Tensor, state: State | None) -> Tensor:
        o = self.memory.recall(x, q, None if state is None else state.memory)
        for i, W in enumerate(self.memories[1:]):
            asked = q
            if self.project:
                P = q.new_zeros(*q[:, 0].shape, q.shape[-1]) if state is None else state.keys[i]
                asked = torch.einsum("bthk,bhkl->bthl", q.to(P.dtype), P).to(q.dtype)
            o = o + W.recall(x, asked, None if state is None else state.local[i])
        return o

    def forget(self, state: State, rows: Tensor) -> State:
        local = tuple(W.forget(s, rows) for W, s in zip(self.memories[1:], state.local, strict=True))
        keys = tuple(P.masked_fill(rows.view(-1, *[1] * (P.ndim - 1)), 0.0) for P in state.keys)
        return State(self.memory.forget(state.memory, rows), local, keys, state.place.masked_fill(rows, 0))

    @property
    def memories(self) -> list[Any]:
        """V's and the local ones."""
        return [self.memory, *self.local]

    def accelerators(self, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
        found = [each.accelerators(device, dtype) for each in self.memories]
        return {name: next((f[name] for f in found if f[name]), None) for name in found[0]}

    def route(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        return self.memory.route(backend, device, dtype)

    def describe(self, tokens: Tokens) -> dict[str, Tensor]:
        """V's."""
        return self.memory.describe(tokens)

    def recall_flops_per_token(self) -> int:
        asked = 2 * self.num_heads * self.key_dim**2 * self.project * len(self.local)
        return sum(each.recall_flops_per_token() for each in self.memories) + asked

    def flops_per_token(self, seq_len: int) -> int:
        asked = 4 * self.num_heads * self.key_dim**2 * self.project * len(self.local)
        return sum(each.flops_per_token(seq_len) for each in self.memories) + asked

    def state_size(self, seq_len: int) -> int:
        keys = self.num_heads * self.key_dim**2 * self.project * len(self.local)
        return sum(each.state_size(seq_len) for each in self.memories) + keys
