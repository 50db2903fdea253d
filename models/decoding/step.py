"""One token's step: embedding -> blocks -> norm -> head, and the states after it.

Issued one by one, the kernels of a step wait for the host far longer than they run. So on a GPU the step is captured
once, as a graph of kernels at fixed places, and started by one call a token. What changes is copied in, the tokens; the
states lie where the step finds and leaves them (held.py), and the sampling stays outside.

Whoever calls the model with one token, a cache and no gradients goes on by such a step, `generate` above all. Where
that is not possible, the model is called layer by layer, with the same result: `refusal` says why.

A step is made for a number of rows and the dtypes of one autocast, in about the time of three tokens without it. A
model keeps the last one, its copies of weights and states included, until it is trained again (or is gone). So it does
with the pieces of prompts of as many rows (pieces.py), which are captured at the first prompt that finds the step
there: the second of a kind.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.block import add_and_norm
from models.cache import Cache
from models.decoding.fused import FusedBlock
from models.decoding.graph import HostNeededError, captured
from models.decoding.held import LOCK, Buffers, Held, signature
from models.decoding.pieces import Pieces, lengths
from models.decoding.weights import Weights

_ALLOWED: ContextVar[bool] = ContextVar("captured", default=True)
_STEPS: weakref.WeakKeyDictionary[nn.Module, Step | str] = weakref.WeakKeyDictionary()
_UNREAD: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # why its pieces were not captured


@contextmanager
def uncaptured() -> Iterator[None]:
    """Inside, no step is captured or replayed."""
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def forget(model: nn.Module) -> None:
    """Gives back what a model's step holds, and its prompts' pieces."""
    _STEPS.pop(model, None)
    _UNREAD.pop(model, None)


def go_on(model: Any, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache] | None:
    """The logits [B, 1, V] after one more token of each row, ids [B, 1], and the cache with it; or None where no step
    is captured.
    """
    if refusal_of_call(ids) is not None:
        return None
    with LOCK, torch.inference_mode(False), torch.no_grad():
        step = _STEPS.get(model)
        if isinstance(step, Step) and step.buffers.filling:
            return None  # rather than another step beside it: the prompt is another thread's
        asked = isinstance(step, Step) and step.buffers.owned_by(cache) and isinstance(cache, Held) and not cache.prompt
        if not asked and refusal(model, ids, cache) is not None:
            return None
        if not (isinstance(step, Step) and step.fits(cache, ids)):
            step = _made(model, ids, cache)
        return None if step is None else step(ids, cache)


@contextmanager
def places(model: Any, prompt: Tensor) -> Iterator[Step | None]:
    """The captured step in whose buffers the states after a prompt [B, T] or [B, T, D] are to lie, so that they are not
    held twice; None where no step is captured for such a prompt, or the cache of another one lies there.
    """
    with LOCK:
        step = _STEPS.get(model) if refusal_of_call(prompt) is None else None
        if not (isinstance(step, Step) and step.awaits(prompt) and refusal_of_model(model, prompt.device) is None):
            step = None
        else:
            step.buffers.filling = True
            step._order()
            step.weights.refresh()
    try:
        yield step
    finally:
        if step is not None:
            step.buffers.filling = False


def refusal_of_pieces(model: Any, prompt: Tensor, segments: Tensor | None = None) -> str | None:
    """Why no pieces of a prompt [B, T] are captured, or None if they are: all, or so many that the host goes through
    the layers fewer times. segments: as the model is told them.
    """
    if (reason := refusal_of_call(prompt) or refusal_of_model(model, prompt.device)) is not None:
        return reason
    with LOCK, torch.inference_mode(False), torch.no_grad():
        step = _STEPS.get(model)
        if not isinstance(step, Step) or not step.awaits(prompt):
            return f"no step is captured for {len(prompt)} rows of such a call, or states of another text lie there"
        return step.refusal_of_pieces(model, prompt, segments)


def refusal_of_call(ids: Tensor) -> str | None:
    """What a call has for which no step is captured."""
    if not _ALLOWED.get():
        return "it is switched off"
    if ids.device.type != "cuda":
        return f"a graph needs a GPU, this is {ids.device.type}"
    if torch.is_grad_enabled():
        return "gradients are wanted; call it under torch.no_grad()"
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "it is being compiled or captured already"
    return None


def refusal(model: Any, ids: Tensor, cache: Cache) -> str | None:
    """Why the step from this cache can't be captured, or None if it can."""
    if (reason := refusal_of_call(ids)) is not None:
        return reason
    if model.state_size(cache.seen) != model.state_size(cache.seen + 1):
        return "its states grow with every token"
    return refusal_of_model(model, ids.device)


def refusal_of_model(model: Any, device: torch.device) -> str | None:
    """What a model has that can't be captured."""
    if any(type(x) is not nn.Parameter or x.device != device for x in model.parameters()):
        return f"its parameters are not all plain ones on {device}"
    layers = (layer for layer in model.modules() if layer is not model)
    if any(x._forward_hooks or x._forward_pre_hooks or "forward" in vars(x) for x in layers):
        return "a layer has hooks, which a graph would leave out"
    if any(type(x).__module__.startswith("peft.") for x in model.modules()):
        return "a layer has an adapter, which may be switched at any token"
    found = _STEPS.get(model)
    return found if isinstance(found, str) else None


def _made(model: Any, ids: Tensor, cache: Cache) -> Step | None:
    _STEPS.pop(model, None)
    try:
        step = Step(model, ids, cache)
    except HostNeededError as error:
        # said once for a model
        warnings.warn(f"tokens are decoded layer by layer: {error}", stacklevel=4)
        _STEPS[model] = str(error)
        return None
    _STEPS[model] = step
    return step


class Step:
    """Of one model, for rows of ids [B, 1] and states like those of a cache. On a CPU it is run as it is."""

    def __init__(self, model: Any, ids: Tensor, cache: Cache) -> None:
        self.dtype, self.ids = autocast_dtype(ids), ids.clone()
        compute = self.dtype or model.head.weight.dtype
        blocks = [FusedBlock(block, ids.device, compute) for block in model.blocks]
        self.weights = Weights(model, blocks, self.dtype)
        self.buffers = Buffers(cache.states)
        self.buffers.load(cache.states)
        run = partial(self._run, _OneToken(model, blocks))
        self.stream = torch.cuda.current_stream() if ids.is_cuda else None
        self.run: Callable[[], Any] = captured(run, "a layer's step") if ids.is_cuda else run
        self.pieces = Pieces(self.buffers, self.dtype)

    def awaits(self, prompt: Tensor) -> bool:
        """Whether this step can go on from the states after a prompt of its own."""
        return self._is_for(prompt) and self.buffers.free and not self.weights.moved

    def _is_for(self, given: Tensor) -> bool:
        same = len(given) == len(self.ids) and given.device == self.ids.device
        return same and autocast_dtype(given) == self.dtype

    def fits(self, cache: Cache, ids: Tensor) -> bool:
        """Whether this step can go on from a cache."""
        if not self._is_for(ids) or self.buffers.filling:
            return False
        if self.buffers.owned_by(cache):
            return (isinstance(cache, Held) and cache.spent) or not self.weights.moved
        return signature(cache.states) == self.buffers.signature and not self.weights.moved

    def __call__(self, ids: Tensor, cache: Cache) -> tuple[Tensor, Held]:
        self._order()
        if self.buffers.owned_by(cache):
            assert isinstance(cache, Held)
            if not cache.spent:
                cache.part()
                if cache.prompt or self.weights.stamp != self.weights.now():
                    self.weights.refresh()
        else:
            if self.buffers.owner is not None and (other := self.buffers.owner()) is not None:
                other.part()
            self.buffers.load(cache.states)
            self.weights.refresh()
        self.ids.copy_(ids)
        self.run()
        return self.logits.clone(), Held(self.buffers, len(ids), cache.seen + 1)

    def read(self, model: Any, prompt: Tensor, segments: Tensor | None) -> tuple[Tensor | None, int]:
        """Inside `places`: what the head reads of the last of a prompt's tokens that go by captured pieces, [B, 1, D],
        and how many of each row those are; the states after them are in the buffers. (None, 0) where there are none:
        `refusal_of_pieces` says why.
        """
        with LOCK, torch.inference_mode(False), torch.no_grad():
            if self.refusal_of_pieces(model, prompt, segments) is not None:
                return None, 0
            sizes = lengths(*prompt.shape)
            try:
                self.pieces.capture(model, prompt, sizes)
            except (HostNeededError, torch.OutOfMemoryError) as error:
                # said once for a model
                warnings.warn(f"prompts go layer by layer: {error}", stacklevel=5)
                _UNREAD[model], self.pieces = str(error), Pieces(self.buffers, self.dtype)
                return None, 0
            return self.pieces(prompt, sizes), sum(sizes)

    def refusal_of_pieces(self, model: Any, prompt: Tensor, segments: Tensor | None) -> str | None:
        """Why none of a prompt's that has found its places here."""
        if segments is not None:
            return "documents are told, padding for example"
        if prompt.is_floating_point():
            return "it is given as vectors"
        if model.context is not None or (model.gradient_checkpointing and model.training):
            return "its blocks are called in training's way"
        if any(block._compiled_call_impl is not None for block in model.blocks):
            return "its blocks are compiled, and may be compiled anew at any call"
        left = prompt.shape[1] - sum(lengths(*prompt.shape))
        if left and passes(model, prompt[:, -left:]) >= passes(model, prompt):
            return f"its last {left} tokens go layer by layer, for which the host needs as long as for all of them"
        return _UNREAD.get(model) or self.pieces.refusal(model)

    def _order(self) -> None:
        """After what another stream has been told."""
        if self.stream is not None and (now := torch.cuda.current_stream()) != self.stream:
            now.wait_stream(self.stream)
            self.stream = now

    def _run(self, form: _OneToken) -> None:
        with torch.autocast(self.ids.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            copies = {f"model.{name}": x for name, x in self.weights.copies.items()}
            self.logits, states = functional_call(form, copies, (self.ids, self.buffers.states), tie_weights=False)
        if signature(states) != self.buffers.signature:
            raise HostNeededError("its states change their shapes from token to token")
        self.buffers.load(states)


def passes(model: Any, prompt: Tensor) -> int:
    """How many times the host goes through the layers for a prompt of which nothing is captured."""
    return -(-prompt.shape[1] // model.piece(prompt))


class _OneToken(nn.Module):
    """(ids [B, 1], states) -> (logits [B, 1, V], states), with the model's parameters or those that functional_call
    puts in their place.
    """

    def __init__(self, model: Any, blocks: list[FusedBlock]) -> None:
        super().__init__()
        self.model, self.blocks = model, blocks

    def forward(self, ids: Tensor, states: Any) -> tuple[Tensor, list[Any]]:
        x, y, after = self.model.embedding(ids), None, []
        for block, state in zip(self.blocks, states, strict=True):
            x, y, state = block(x, y, state)
            after.append(state)
        return self.model.head(add_and_norm(x, y, self.model.norm)[1]), after


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """Of the products around a call, None without autocast."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
