"""The taxonomy, made from the configs: what every mixer in conf/mixer is, and what it costs.

    python scripts/recipes.py [--size 340m] [--markdown]
    python scripts/recipes.py --write       # writes the table into docs/family.md

Of the five choices that a mixer is, the table has which decay (how much each past pair counts), which function class
(what the memory can express) and which solver (how the fit is computed); and on which backends it runs. State: numbers
one layer holds per sequence at the end of the size's sequences. FLOPs: of one layer's mixer, forward, per token on
average over such a sequence.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from conf import schema
from models.build import build
from models.mixers.mixer import Mixer

CONF = Path(__file__).resolve().parent.parent / "conf"
PRESETS = sorted(path.stem for path in (CONF / "mixer").glob("*.yaml"))
PAGE = CONF.parent / "docs" / "family.md"
BEGIN, END = "<!-- table: python scripts/recipes.py --write -->", "<!-- end of table -->"


class Recipe(NamedTuple):
    """One row: the choices in words, the numbers, and where it stands in the family.

    branch: the folder of models/regression that its memory is in. composite: a memory and something around it, with a
    class of its own in models/mixers.
    """

    preset: str
    decay: str
    memory: str
    solver: str
    state: int
    flops: int
    backends: str
    branch: str
    composite: bool


def composed(preset: str, *overrides: str) -> DictConfig:
    """The configuration of a model with that preset in every layer, Hydra's choices included."""
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            "train", [f"model={preset}", *overrides, "name=recipe", "run_dir=none"], return_hydra_config=True
        )


def mixer_of(cfg: DictConfig) -> Mixer:
    """One layer's mixer."""
    node = OmegaConf.to_container(cfg.model.mixers.main, resolve=True)
    return build(node, hidden_size=cfg.model.hidden_size, layer_index=0)


def recipe(preset: str, size: str) -> Recipe:
    """The preset as model=PRESET size=SIZE would build it."""
    cfg = composed(preset, f"size={size}")
    chosen = {key.split("@")[0]: name for key, name in cfg.hydra.runtime.choices.items() if "@model.mixers" in key}
    mixer = mixer_of(cfg)
    regressor, features = mixer.regressor, chosen["features"]
    memory = regressor.function_class if features == "identity" else f"{regressor.function_class} in {features}"
    if mixer.rotary is not None:
        memory += ", rotary"
    accelerated = regressor.accelerators(torch.device("cuda"), torch.bfloat16)
    return Recipe(
        preset,
        chosen["decay"],
        memory,
        regressor.fit,
        mixer.state_size(cfg.seq_len),
        mixer.flops_per_token(cfg.seq_len),
        ", ".join([*accelerated, "torch", "recurrent"]),
        type(regressor).__module__.split(".")[2],
        type(mixer) is not Mixer,
    )


def table(rows: list[Recipe], markdown: bool) -> str:
    """Lines for a terminal, or for docs/family.md."""
    head = ("mixer", "decay", "memory", "solver", "state", "MFLOPs", "backends")
    cells = [head, *((*r[:4], f"{r.state:,}", f"{r.flops / 1e6:.1f}", r.backends) for r in rows)]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    align = [str.ljust] * 4 + [str.rjust] * 2 + [str.ljust]
    rows_of_text = ([f(c, w) for f, c, w in zip(align, row, widths, strict=True)] for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in rows_of_text)


def with_table(page: str, lines: str) -> str:
    """The page with these lines between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{lines}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="340m", choices=sorted(path.stem for path in (CONF / "size").glob("*.yaml")))
    parser.add_argument("--markdown", action="store_true", help="as docs/family.md has it")
    parser.add_argument("--write", action="store_true", help="write it into docs/family.md")
    arguments = parser.parse_args()
    lines = table([recipe(preset, arguments.size) for preset in PRESETS], arguments.markdown or arguments.write)
    if arguments.write:
        PAGE.write_text(with_table(PAGE.read_text(), lines))
    else:
        print(lines)


if __name__ == "__main__":
    main()
