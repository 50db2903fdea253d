"""One token's step: embedding -> blocks -> norm -> head, and the states after it.

Issued one by one, the kernels of a step wait for the host far longer than they run. So on a GPU the step is captured
once, as a graph of kernels at fixed places, and started by one call a token. What changes is copied in, the tokens; the
states lie where the step finds and leaves them (held.py), and the sampling stays outside.

Whoever calls the model with one token, a cache and no gradients goes on by such a step, `generate` above all. Where
that is not possible, the model is called layer by layer, with the same result: `refusal` says why.

A step is made for a number of rows and the dtypes of one autocast, in about the time of three tokens without it. A
model keeps the last one, its copies of weights and states included, until it is trained again (or is gone).
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
from models.decoding.held import LOCK, Buffers, Held, signature
from models.decoding.weights import Weights

_ALLOWED: ContextVar[bool] = ContextVar("captured", default=True)
_STEPS: weakref.WeakKeyDictionary[nn.Module, Step | str] = weakref.WeakKeyDictionary()


@contextmanager
def uncaptured() -> Iterator[None]:
    """Inside, no step is captured or replayed."""
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def forget(model: nn.Module) -> None:
    """Gives back what a model's step holds."""
    _STEPS.pop(model, None)


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
            step = _captured(model, ids, cache)
        return None if step is None else step(ids, cache)


@contextmanager
def places(model: Any, prompt: Tensor) -> Iterator[Buffers | None]:
    """Where a captured step will look for the states after a prompt [B, T] or [B, T, D], so that they are not held
    twice; None where no step is captured for such a prompt, or the cache of another one lies there.
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
        yield None if step is None else step.buffers
    finally:
        if step is not None:
            step.buffers.filling = False


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


def _captured(model: Any, ids: Tensor, cache: Cache) -> Step | None:
    forget(model)
    try:
        step = Step(model, ids, cache)
    except HostNeededError as error:
        # said once for a model
        warnings.warn(f"tokens are decoded layer by layer: {error}", stacklevel=4)
        _STEPS[model] = str(error)
        return None
    _STEPS[model] = step
    return step


class HostNeededError(RuntimeError):
    """A step that needs the host."""


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
        self.run: Callable[[], Any] = self._graph(run) if ids.is_cuda else run

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

    def _graph(self, run: Callable[[], None]) -> Callable[[], None]:
        """After two runs for what first calls set up. In the second it is an error where the host waits for the device,
        which a graph can't.
        """
        side, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            except RuntimeError as error:
                raise HostNeededError(f"a layer's step waits for the host ({error})") from error
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        return graph.replay


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
