"""A sequence that lies on several processes is the sequence: outputs and gradients, of every mixer, and of the
feed-forward layer that learns."""

from __future__ import annotations

import copy
import multiprocessing
import traceback
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.context import Context
from models.regression.local.ring import Ring
from models.training.recompute import Recompute
from tests.laws.presets import PRESETS, inputs, largest_difference, mixer
from tests.regression.linear import test_in_place
from tests.test_language_model import model, tokens

RANKS, ROWS, TOKENS = 4, 2, 24  # six tokens a process: less than a chunk, and no multiple of a document
# whose pairs pass by: name, preset, settings, the tokens of a document
RINGS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "one document": ("softmax", {}, None),
    "documents": ("softmax", {"num_kv_heads": 1, "regressor__block": 4}, 5),
    "long documents": ("gated_softmax", {}, 11),
    "window": ("softmax", {"regressor__window": 3}, 17),
    "window of two processes": ("softmax", {"regressor__window": 9, "num_kv_heads": 1}, None),
    "window of one": ("softmax", {"regressor__window": 1}, 5),
    "forgetting in one document": ("forgetting", {}, None),
    "forgetting in documents": ("forgetting", {"num_kv_heads": 1}, 11),
    "forgetting in a window": ("forgetting", {"regressor__window": 9}, 17),
    "hopfield in documents": ("hopfield", {}, 11),
}

IN_PLACE = "in_place"  # a feed-forward layer, and no mixer
ORDERS = [(["gated_delta"], "all"), (["softmax"], "none"), (["forgetting"], "all"), (["softmax", "gated_delta"], "all")]


def gradients(
    m: nn.Module, x: Tensor, documents: Tensor | None, context: Context | None = None, ring: bool = False
) -> list[Tensor]:
    """The output, and the gradients of a fixed function of it by x and by every parameter. With a context what each
    process has of its tokens side by side, and the sum of what they have of the parameters."""
    share = context.share if context else torch.Tensor.clone
    m, mine = copy.deepcopy(m), share(x).clone().requires_grad_()
    own, before = None if documents is None else share(documents), None
    if context:
        context.begin(x[..., 0], documents)
        before = context.elsewhere(m, own) if ring else context.receive(mine)
    y, state = m(mine, before, own)
    weight = torch.linspace(-1, 1, x[..., 0].numel() * y.shape[2], dtype=y.dtype).view(*x.shape[:2], -1)
    y = context.hand_on(y, state) if context and not ring else y
    (y * share(weight)).sum().backward()  # torch.autograd.grad would pass over the states
    found = [y.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in (mine, *m.parameters()))]
    if context is None:
        return found
    of_all: list[Any] = [None] * RANKS
    dist.all_gather_object(of_all, found)
    first = dist.get_rank() // context.size * context.size
    each = list(zip(*of_all[first : first + context.size], strict=True))
    return [torch.cat(parts, dim=1) if i < 2 else sum(parts[1:], parts[0]) for i, parts in enumerate(each)]


def cases() -> list[tuple[str, str, dict[str, Any], int | None]]:
    rings = [(name, *case) for name, case in RINGS.items() if case[0] in PRESETS]
    return [*((name, name, {}, 5) for name in [*PRESETS, IN_PLACE]), *rings]


Exchange = list[tuple[str, int, int]]  # what a process does at a time: "send", "receive" or "all", with whom, numbers


def recorded(context: Context, pattern: list[str], recompute: str) -> list[Exchange]:
    """What this process exchanges in two passes of a model of two layers, forward and backward, and one without."""
    found: list[Exchange] = []
    ring = context.ring

    class Recorded(Ring):
        def exchange(self, send: Any, receive: Any) -> Any:
            pairs = [("send", place, x.numel()) for x, place in send]
            pairs += [("receive", place, x.numel()) for x, place in receive]
            found.extend([pairs] if pairs else [])
            return super().exchange(send, receive)

        def add_up(self, x: Tensor) -> None:
            found.append([("all", -1, x.numel())])
            super().add_up(x)

        def gather(self, x: Tensor) -> list[Tensor]:
            found.append([("all", -1, x.numel())])
            return super().gather(x)

    context.ring = Recorded(ring.group, ring.size, ring.place)
    m = model(*pattern, num_layers=2).train()
    Recompute(m, recompute)
    ids, documents = tokens(2, TOKENS), (torch.arange(TOKENS) // 11).expand(2, -1)
    m.context = context
    for grad in (True, False, True):
        context.begin(ids, documents)
        with torch.set_grad_enabled(grad):
            own = [context.share(x) for x in (ids, ids, documents)]
            nats = m.sum_nats(*own)
        if grad:
            nats.backward()
    context.ring = ring
    return found


def stuck(each: list[list[Exchange]]) -> str:
    """Where processes that keep nothing for later would wait for ever, "" if nowhere: a process goes on when all of
    what it does at a time has found its like, in order, in what others do then."""
    at, left = [0] * len(each), [list(own[0]) if own else [] for own in each]

    def found(rank: int, kind: str, peer: int) -> tuple[str, int, int] | None:
        return next((op for op in left[rank] if op[:2] == (kind, peer)), None)

    moved = True
    while moved:
        moved = False
        for rank, other in product(range(len(each)), repeat=2):
            send, receive = found(rank, "send", other), found(other, "receive", rank)
            if send and receive:
                assert send[2] == receive[2], (rank, other, send, receive)
                left[rank].remove(send)
                left[other].remove(receive)
                moved = True
        if all(ops and ops[0][0] == "all" for ops in left):
            assert len({ops[0] for ops in left}) == 1
            left, moved = [ops[1:] for ops in left], True
        for rank, own in enumerate(each):
            if not left[rank] and at[rank] < len(own):
                at[rank], moved = at[rank] + 1, True
                left[rank] = list(own[at[rank]]) if at[rank] < len(own) else []
    return "; ".join(
        f"{rank} in {i} of {len(own)}: {left[rank]}"
        for rank, (i, own) in enumerate(zip(at, each, strict=True))
        if i < len(own)
    )


def process(rank: int, folder: Path) -> None:
    """Writes the largest difference of each preset and size of context."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
        contexts = [Context(2), Context(4)]
        x, found = inputs(ROWS, TOKENS), {}
        for name, preset, settings, length in cases():
            documents = None if length is None else (torch.arange(TOKENS) // length).expand(ROWS, -1)
            m = test_in_place.layer(grad_batch=2) if preset == IN_PLACE else mixer(preset, **settings)
            whole = gradients(m, x, documents) if rank == 0 else None
            for context in contexts:
                ours = gradients(m, x, documents, context, ring=name in RINGS)
                if whole is not None:
                    found[name, context.size] = largest_difference(ours, whole)
        for (pattern, recompute), context in product(ORDERS, contexts):
            of_all: list[Any] = [None] * RANKS
            dist.all_gather_object(of_all, recorded(context, pattern, recompute))
            assert all(of_all) and not (where := stuck(of_all[: context.size])), (pattern, recompute, where)
        if rank == 0:
            torch.save(found, folder / "found.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise


def test_processes_that_would_wait_for_ever_are_found():
    both_send = [[[("send", 1, 5)], [("receive", 1, 5)]], [[("send", 0, 5)], [("receive", 0, 5)]]]
    assert stuck(both_send).startswith("0 in 0 of 2")
    at_a_time = [[first + second] for first, second in both_send]
    assert not stuck(at_a_time)
    assert stuck([[[("all", -1, 1)], [("send", 1, 5)]], [[("receive", 0, 5)], [("all", -1, 1)]]])


@pytest.mark.slow
def test_tokens_of_one_sequence_on_several_processes(tmp_path):
    fork = multiprocessing.get_context("fork")  # which has imported and composed all already
    mixer(PRESETS[0])
    processes = [fork.Process(target=process, args=(rank, tmp_path)) for rank in range(RANKS)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
    errors = [path.read_text() for path in sorted(tmp_path.glob("error-*"))]
    assert [each.exitcode for each in processes] == [0] * RANKS, errors[0] if errors else "not done in time"
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert len(found) == 2 * len(cases())
    assert max(found.values()) < 1e-10, {k: v for k, v in found.items() if v >= 1e-10}
