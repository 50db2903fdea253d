"""What `python train.py --help` prints: the groups, and each choice with the first line of its file."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from conf.known import folders

INSIDE = {  # groups that are parts of another, and how their choices are written
    "mixer": "mixer@model.mixers.main",
    "decay": "decay@model.mixers.main.decay",
    "features": "features@model.mixers.main.features",
    "regressor": "regressor@model.mixers.main.regressor",
}
HEAD = """\
python {script} [GROUP=CHOICE ...] [SETTING=VALUE ...]
python {script} -m GROUP=CHOICE,CHOICE seed=1,2         a sweep: a job for every combination
python {script} GROUP=CHOICE --cfg job                  prints all settings, and does nothing else

Groups, with their choices; * marks what this command chooses:
"""


def help_text(*, _root_: DictConfig) -> str:
    """The template of Hydra's help, in which a $ is doubled. _root_: the config that the command means."""
    width = shutil.get_terminal_size((120, 24)).columns
    return "\n".join([HEAD.format(script=sys.argv[0]), *_lines(_root_.hydra.runtime, width)]).replace("$", "$$")


def _lines(runtime: DictConfig, width: int) -> Iterator[str]:
    chosen = {(key.partition("@")[0], str(name)) for key, name in runtime.choices.items()}
    order = [*(key.partition("@")[0] for key in reversed(list(runtime.choices))), *INSIDE]  # which belong at the end
    order += [key for key in runtime.choices if key.startswith("hydra/")]
    groups = files(runtime)
    for group in sorted(groups, key=lambda group: len(order) - order[::-1].index(group) if group in order else 999):
        longest = max(map(len, groups[group]))
        yield f"{INSIDE.get(group, group)}="
        for option, path in sorted(groups[group].items()):
            head = f"  {'*' if (group, option) in chosen else ' '} {option:<{longest}}  "
            yield f"{head}{textwrap.shorten(first_line(path), max(20, width - len(head)), placeholder=' ...')}".rstrip()
        yield ""


def files(runtime: DictConfig) -> dict[str, dict[str, Path]]:
    """By group and choice, of this repository and of other folders (hydra.searchpath); Hydra's own are left out.
    Choices in a folder of their own have its name: baseline/mamba."""
    found: dict[str, dict[str, Path]] = {}
    for source in runtime.config_sources:
        for folder in folders(source.schema, source.path) if source.provider != "hydra" else ():
            for path in [*folder.glob("*/*.yaml"), *folder.glob("*/*/*.yaml")]:
                group, _, option = path.relative_to(folder).with_suffix("").as_posix().partition("/")
                if group == "hydra":
                    group, option = f"hydra/{option.partition('/')[0]}", path.stem
                found.setdefault(group, {}).setdefault(option, path)
    return found


def first_line(path: Path) -> str:
    """The first comment that says something; "" where there is none."""
    comments = (line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((line for line in comments if line and not line.startswith("@package")), "")
