"""Models on the Hugging Face hub: the folder of one, from the cache or over the network."""

from __future__ import annotations

import json
import re
from pathlib import Path

from models.language_model import LanguageModelConfig

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ["*.json", "*.safetensors"]  # no code: what is in a checkpoint can't run any


def is_name(where: str) -> bool:
    """Whether it may be a name of the hub, OWNER/MODEL, and not the path of a run that is not there."""
    return NAME.fullmatch(where) is not None and not Path(where).parent.exists()


def download(where: str, said: str) -> Path:
    """Its folder, in the cache. Raises ValueError where it can't be reached, or is a model of another kind."""
    import huggingface_hub  # which the network needs, and nothing else here

    try:
        config = huggingface_hub.hf_hub_download(where, "config.json")
        refuse_others(Path(config), said)
        return Path(huggingface_hub.snapshot_download(where, allow_patterns=FILES))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{said} is no folder here, and as a name on the hub it can't be reached, nor is it in the cache "
            f"({type(error).__name__}: {reason[:200]})"
        ) from error


def refuse_others(config: Path, said: str) -> None:
    """Raises ValueError for the config.json of a model of another kind."""
    kind = json.loads(config.read_text()).get("model_type")
    if kind != LanguageModelConfig.model_type:
        raise ValueError(
            f"{said} is a model of model_type={kind!r}, which is not one of this repository; a Qwen3 or Qwen3-Next "
            "becomes one by  python scripts/import_model.py NAME --folder FOLDER"
        )
