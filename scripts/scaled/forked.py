"""A run of train.py in a process that is forked from this one, which has imported everything."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch.distributed as dist

import train

ROOT = Path(__file__).resolve().parents[2]


def forked(
    words: Sequence[str], environment: Mapping[str, str], log: IO[bytes], first: Callable[[], None] | None = None
) -> int:
    """The id of the process, which leads a session of its own, has these variables too and writes to log. words: the
    command line's. first: what the process does before. Its exit code is the command's.
    """
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not what this process does
        os.setsid()
        os.environ.update(environment)
        os.chdir(ROOT)
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        if first:
            first()
        sys.argv = [str(ROOT / "train.py"), *words]
        train.main()
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, flush=True)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if dist.is_initialized():  # as Lightning does when Python ends
            dist.destroy_process_group()
        os._exit(code)
