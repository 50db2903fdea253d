"""What is done again and again at the same places: on a GPU captured once, as a CUDA graph, and then started by one
call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class HostNeededError(RuntimeError):
    """What needs the host while it runs, and so is no graph."""


def captured(run: Callable[[], None], what: str, pool: Any = None) -> Callable[[], None]:
    """The replay of run's kernels, after two runs for what first calls set up. pool: of the graph's memory; graphs that
    never run side by side, and need nothing of each other's, may have one together.

    Raises HostNeededError where the host waits for the device in the second run, or does what else a graph can't. what:
    is run.
    """
    stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(stream)
    try:
        with torch.cuda.stream(side):
            run()
            _run_without_waiting(run, what)
    finally:
        stream.wait_stream(side)  # what has begun there still writes
    graph = torch.cuda.CUDAGraph()
    try:
        # a capture that fails would not go back to the stream
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise HostNeededError(f"{what} can't be captured ({error})") from error
    return graph.replay


def _run_without_waiting(run: Callable[[], None], what: str) -> None:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise HostNeededError(f"{what} waits for the host ({error})") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
