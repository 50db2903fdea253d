"""The model card: README.md of an exported folder, with what a stranger asks of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from models.language_model import LanguageModel
from scripts.exporting.qwen import ARCHITECTURES
from scripts.exporting.source import Source

# data has a section of its own, and the rest says where a run ran and what it showed
SHOWN = ("model", "optimizer", "schedule", "seq_len", "batch_tokens", "tokens", "clip_norm", "seed")
OPENS = {
    "code": "the code beside the weights, which needs transformers",
    "fla": "flash-linear-attention, which needs a GPU and Triton",
}
PYTHON = """import {library}transformers

folder = "."  # or what the folder is called on the hub
model = transformers.AutoModelForCausalLM.from_pretrained(folder{trust})
"""
TEXT = """tokenizer = transformers.AutoTokenizer.from_pretrained(folder{trust})
prompt = tokenizer("def", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
"""


def card(source: Source, architecture: str, commit: dict[str, Any], has_tokenizer: bool) -> str:
    """architecture: code, qwen3, qwen3_next or fla.  commit: of this repository, today."""
    trust = ", trust_remote_code=True" if architecture == "code" else ""
    opens = OPENS.get(architecture) or f"transformers' own {ARCHITECTURES[architecture]}"
    library = "fla, " if architecture == "fla" else ""
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [test-time-regression]\n---",
        f"# {source.folder.name}",
        f"{describe(source.model)} It is opened by {opens}:",
        f"```python\n{(PYTHON + TEXT * has_tokenizer).format(trust=trust, library=library)}```",
        *sections(source),
        f"## Export\n\n    python scripts/export.py {source.folder} --to {architecture}\n\n{at(commit)}",
    ]
    return "\n\n".join(parts) + "\n"


def describe(model: LanguageModel) -> str:
    """One sentence."""
    c = model.config
    regressors = [type(block.mixer.regressor).__name__ for block in model.blocks if hasattr(block.mixer, "regressor")]
    kinds = [f"{name} (in {c.layers.count(name)})" for name in dict.fromkeys(c.layers)]
    made = f", whose memories are {', '.join(dict.fromkeys(regressors))}" if regressors else ""
    return (
        f"A language model of {sum(p.numel() for p in model.parameters()):,} parameters: {c.num_layers} layers "
        f"{c.hidden_size} wide with the mixers {', '.join(kinds)}{made}, and a vocabulary of {c.vocab_size:,}."
    )


def sections(source: Source) -> Iterator[str]:
    """What the run says: data, metrics, command, config."""
    config, result = source.config, source.result
    if config is None:
        yield "Nothing is known of its training: the folder that it was exported from is no run's."
        return
    data = {key: config[key] for key in ("data", "tokenizer")}
    yield f"## Data\n\n```yaml\n{OmegaConf.to_yaml(data)}```"
    if result is None:
        yield f"## Metrics\n\nThe run is not finished. These are the weights of {source.path.name}."
    else:
        rows = [f"| {name.removeprefix('validation/')} | {value:.6g} |" for name, value in result.items()
                if name.startswith("validation/") and isinstance(value, int | float)]  # fmt: skip
        if averaged := result.get("averaged"):
            yield f"These weights are the mean of those after {', '.join(f'{step:,}' for step in averaged)} steps."
        counts = [f"{name}: {result[name]:,}" for name in ("tokens", "flops") if result.get(name)]
        yield "\n".join(["## Metrics\n\n| validation | |\n| --- | --- |", *rows, f"\nTrained on {', '.join(counts)}."])
        versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
        command = f"    {result['command']}\n\n" if result.get("command") else ""
        yield f"## Training\n\n{command}{at(result)}\n\nWith {versions}, on {result.get('device')}."
    yield f"## Config\n\n```yaml\n{OmegaConf.to_yaml({key: config[key] for key in SHOWN if key in config})}```"


def at(commit: dict[str, Any]) -> str:
    if not commit.get("commit"):
        return "The commit is not known."
    return f"At commit {commit['commit']}{' with changes to its files' if commit.get('changed') else ''}."
