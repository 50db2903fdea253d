"""Exports a trained model for those who don't have this repository:

    python scripts/export.py runs/NAME                   # as transformers' own architecture, or else code and all
    python scripts/export.py runs/NAME --to code         # code and all: opens with trust_remote_code=True
    python scripts/export.py runs/NAME --to qwen3_next   # as Qwen3-Next, or say why that can't be
    python scripts/export.py runs/NAME --to fla          # as flash-linear-attention's model of this mixer
    python scripts/export.py FOLDER --folder there       # an exported model, and not into FOLDER/exported/

A folder that transformers opens, with a README.md that says what the model is. docs/exporting.md has the details.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.build import current
from models.training import origin
from models.training.summary import quiet, say
from scripts.exporting import fla_models, qwen
from scripts.exporting.card import card
from scripts.exporting.code import AUTO_MAP, write_code
from scripts.exporting.source import Source, opened

CODE, FLA = "code", "fla"
TO = (*qwen.ARCHITECTURES, CODE, FLA)  # the first that fits is taken, so that fla, which needs a GPU, is for who asks
MANY = 32_768  # positions, for a config whose run is not known; it limits nothing


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN|FOLDER", help="a run, a checkpoint of one, or an exported model")
    parser.add_argument("--to", choices=TO, help="as what (default: the first that computes the same function)")
    parser.add_argument("--folder", type=Path, help="where to (default: exported/TO in the folder of the model)")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    given = arguments(words)
    quiet()
    try:
        say(f"exported  {export(opened(given.model), given.to, given.folder)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


def export(source: Source, to: str | None = None, folder: Path | None = None) -> Path:
    """Writes the folder and returns it; it is whole or not there. Raises ValueError where something is there already,
    and where the model is no such architecture.
    """
    architecture, reasons = choose(source, to)
    folder = folder or source.folder / "exported" / architecture
    if folder.exists():
        raise ValueError(f"--folder {folder} is there already; name another, or remove it")
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    commit = origin.commit()
    for reason in reasons:
        say(f"not as    {reason}")
    if architecture == CODE:
        as_code(source, draft, commit)
    else:
        positions = source.config["seq_len"] if source.config else MANY
        made = fla_models.as_fla if architecture == FLA else partial(qwen.as_qwen, to=architecture)
        made(source.model, max_positions=positions).save_pretrained(draft)
    has_tokenizer = source.save_tokenizer(draft)
    (draft / "README.md").write_text(card(source, architecture, commit, has_tokenizer))
    draft.rename(folder)
    return folder


def choose(source: Source, to: str | None) -> tuple[str, list[str]]:
    """What it is exported as, and why not as what comes first. Raises ValueError where it is no `to`."""
    reasons: list[str] = []
    for architecture in TO if to is None else (to,):
        if (reason := _refusal(source, architecture)) is None:
            return architecture, reasons
        reasons.append(f"{architecture}: {reason}")
    raise ValueError(f"--to {reasons[0]}")


def _refusal(source: Source, architecture: str) -> str | None:
    if architecture == FLA:
        return fla_models.refusal(source.model)
    return None if architecture == CODE else qwen.refusal(source.model, architecture)


def as_code(source: Source, folder: Path, commit: dict[str, Any]) -> None:
    model = source.model
    model.config.mixers, model.config.auto_map = current(model.config.mixers), AUTO_MAP
    where = f" at {commit['commit']}{' with changes' if commit['changed'] else ''}" if commit["commit"] else ""
    write_code(folder, model.config.mixers, f" of test-time-regression{where}, under its LICENSE")
    model.save_pretrained(folder)
    shutil.copy(origin.ROOT / "LICENSE", folder)


if __name__ == "__main__":
    main()
