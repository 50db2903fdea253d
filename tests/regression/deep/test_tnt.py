"""Laws of TNT: without local memories it is Titans, and without shards and projections a sum of memories."""

from __future__ import annotations

import pytest
import torch

from models.parts.sizes import Sizes
from models.regression.deep import TNT, DeepMemory
from tests.regression.deep.test_deep import DOCUMENTS, H
from tests.regression.deep.test_inner_optimizers import Tokens, drawn

K, V = 6, 5


@pytest.mark.parametrize("local", [[], [4], [4, 16]])
def test_it_is_a_sum_of_memories(local):
    torch.manual_seed(0)
    tnt = TNT(Sizes(4, H, H, K, V), "torch", 8, 16, local, shard=64, project=False, expansion=1.5).double()
    _, (x, q, k, v, log_decay) = drawn("muon")
    tokens = Tokens(x, q, k, v, log_decay, DOCUMENTS[:, : x.shape[1]])
    expected = torch.zeros_like(v)
    for b, memory in zip([16, *local], tnt.memories, strict=True):
        titans = DeepMemory(Sizes(4, H, H, K, V), "torch", 8, b, expansion=1.5).double()
        titans.load_state_dict(memory.state_dict())
        expected = expected + titans(tokens)[0]
    assert torch.equal(tnt(tokens)[0], expected)


def test_a_local_mini_batch_is_no_longer_than_a_shard():
    with pytest.raises(
        ValueError, match=r"regressor.local_batches=\[4, 9\] must be a list of numbers .* at most the shard=8"
    ):
        TNT(Sizes(4, H, H, K, V), local_batches=[4, 9], shard=8)


@pytest.mark.parametrize("T", [7, 8, 24, 26])  # within a shard, whole shards, and one that is cut short
def test_shards_of_rows_without_documents_are_rows_of_their_own(T):
    """The same as of rows that are told to be of one document, where they are counted; and so is what comes next."""
    torch.manual_seed(0)
    tnt = TNT(Sizes(4, H, H, K, V), "torch", 4, 16, [4, 2], shard=8, expansion=1.5).double()
    tokens = Tokens(*drawn("muon", 2 * T)[1])
    first, rest = (Tokens(*(x[:, part] for x in tokens[:5])) for part in (slice(T), slice(T, None)))
    one = torch.zeros(tokens.x.shape[:2], dtype=torch.long)
    o, state = tnt(first)
    assert torch.allclose(o, tnt(first._replace(segments=one[:, :T]))[0], atol=1e-12)
    o = torch.cat([o, tnt(rest, state)[0]], dim=1)
    assert torch.allclose(o, tnt(tokens._replace(segments=one))[0], atol=1e-12)
