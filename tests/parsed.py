"""Each file of the config is parsed once in a process. Hydra reads thirty for a config, and parses them anew for the
next, which is a third of the time that composing takes."""

from __future__ import annotations

import io
from copy import deepcopy
from functools import cache
from typing import Any

from omegaconf import OmegaConf


@cache
def parse_once() -> None:
    """OmegaConf.load returns a copy of what the same text was parsed to before. What is no YAML fails each time."""
    load, parsed = OmegaConf.load, {}

    def load_or_copy(file_: Any) -> Any:
        if not isinstance(file_, io.TextIOBase):
            return load(file_)
        start = file_.tell()
        if (text := file_.read()) not in parsed:
            file_.seek(start)
            parsed[text] = load(file_)
        return deepcopy(parsed[text])

    OmegaConf.load = load_or_copy
