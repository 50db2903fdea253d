"""Where a result comes from: the command, the versions of what computed it, the commit, the device."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

PACKAGES = {name: name for name in ("torch", "lightning", "transformers", "triton")} | {"fla": "flash-linear-attention"}
ROOT = Path(__file__).parents[2]


def origin(device: torch.device, num_devices: int = 1) -> dict[str, Any]:
    """Asked before the first step, since files may change while a run runs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu (threads: {torch.get_num_threads()})"
    device_name = f"{num_devices} x {name}" if num_devices > 1 else name
    return {"command": command(), "versions": versions(), **commit(), "device": device_name}


def command() -> str:
    """What was typed. Of a job of a sweep, the sweep of this one job, which has the same folder."""
    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return shlex.join(["python", Path(sys.argv[0]).name, *(["-m"] if sweep else []), *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Of Python and of the packages that are there."""
    found = {"python": platform.python_version()}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """Of this repository, and whether its files are others than the commit's; None where there is no git."""
    try:
        head = _git("rev-parse", "HEAD")
        return {"commit": head, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def describe(found: dict[str, Any]) -> str:
    """One line."""
    parts = [f"{name} {number}" for name, number in found["versions"].items()]
    if found["commit"]:
        parts.append(f"commit {found['commit'][:10]}{' with changes' if found['changed'] else ''}")
    return f"{', '.join(parts)}; {found['device']}"
