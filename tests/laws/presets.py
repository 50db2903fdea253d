"""Every preset in conf/mixer, built small: what the laws are tried on. A new YAML there needs no line here.

`only` puts a recipe from any other conf in their place: pytest tests/laws --recipe (tests/laws/conftest.py).
"""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_class as locate
from omegaconf import OmegaConf
from torch import Tensor

from conf import schema
from models.build import build, problems
from models.mixers.mixer import Mixer
from models.regression.memory import Memory

CONF = Path(__file__).parents[2] / "conf"
PRESETS = sorted(path.stem for path in (CONF / "mixer").glob("*.yaml"))
ELSEWHERE: list[Path] = []  # the conf of somebody else that hydra searches too
BUILT: dict[tuple[Any, ...], tuple[Mixer, Tensor]] = {}  # mixers, and the state of torch's generator after building
HIDDEN, HEADS, CHUNK = 32, 2, 8
AT_ONCE = 12
DECAYS = {
    "none": "none",
    "fixed": "head",
    "scalar": "head",
    "channel": "channel",
    "channel_rate": "channel",
    "signed": "signed",
}  # conf/decay: kind


def only(path: Path) -> None:
    """The recipe CONF/mixer/NAME.yaml, from whose CONF its parts may come too, is the only preset from here on. Raises
    ValueError for one that is not there, or can't be composed or built."""
    path = path.resolve()
    if not path.is_file() or path.suffix != ".yaml" or path.parent.name != "mixer":
        raise ValueError("this is not the file of a recipe; it must be one named conf/mixer/NAME.yaml")
    conf = path.parents[1]
    if conf != CONF and path.stem in PRESETS:
        raise ValueError(f"the repository has a mixer {path.stem}, which hydra would take first; choose another name")
    PRESETS[:], ELSEWHERE[:] = [path.stem], [conf] if conf != CONF else []
    recipes.cache_clear()
    BUILT.clear()
    try:
        found = list(problems(recipe(path.stem), "mixer", targets=("models.",)))
    except HydraException as error:
        raise ValueError(" ".join(str(error).split())) from None
    if found:
        raise ValueError("\n".join(found))
    mixer(path.stem)


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """Every preset as conf/mixer has it, for a model of HIDDEN and HEADS; a segment is a chunk. AT_ONCE are composed at
    a time: what Hydra does for a config that is already there it does again for each, so that all together would take
    the square of their number."""
    schema.register()
    searched = [f"hydra.searchpath=[{','.join(f'file://{conf}' for conf in ELSEWHERE)}]"] if ELSEWHERE else []
    settings = ["name=law", "run_dir=none", f"model.num_heads={HEADS}"]
    found: dict[str, dict[str, Any]] = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for start in range(0, len(PRESETS), AT_ONCE):
            some = PRESETS[start : start + AT_ONCE]
            chosen = [f"+mixer@model.mixers.{preset}={preset}" for preset in some]
            mixers = compose("train", [*searched, *chosen, *settings]).model.mixers
            for preset in some:
                if "segment" in mixers[preset]:
                    mixers[preset].segment = CHUNK
                if "key_dim" in mixers[preset]:
                    mixers[preset].key_dim = 4  # of many features
            found |= OmegaConf.to_container(mixers, resolve=True)
    return {preset: found[preset] for preset in PRESETS}


def recipe(preset: str) -> dict[str, Any]:
    return recipes()[preset]


def marked(presets: list[str]) -> list[Any]:
    """The presets as cases of a test. Of those that share the class of the mixer and of its memory's regressor only the
    first is in the quick look (pytest -m "not slow"); what is written twice for two classes is tried there on both."""
    first: dict[tuple[str, str], str] = {}
    for preset in presets:
        first.setdefault((recipe(preset)["_target_"], parts(recipe(preset))[0]["regressor"]["_target_"]), preset)
    return [preset if preset in first.values() else pytest.param(preset, marks=pytest.mark.slow) for preset in presets]


def parts(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipes in a recipe: a memory's and attention's, or itself."""
    return [node[name] for name in ("memory", "attention") if name in node] or [node]


def change(node: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The recipe, in place, with settings such as num_heads=1, regressor__window=3 or attention__regressor__window=3.
    Where a memory stands beside attention its regressor, decay and features are meant, and else both."""
    for name, value in settings.items():
        *path, last = name.split("__")
        first = [*path, last][0]
        of_memory = first in ("regressor", "decay", "features")
        for target in [node] if first in node else parts(node)[:1] if of_memory else parts(node):
            for key in path:
                target = target[key]
            target[last] = value
    return node


def mixer(preset: str, backend: str = "torch", dtype: torch.dtype = torch.float64, **settings: Any) -> Mixer:
    """The preset's mixer with fixed random weights, in chunks of CHUNK tokens where it has chunks; settings as in
    `change`. A copy of one that is built once, which takes a tenth of the time of building it; torch's generator is
    left as building leaves it."""
    key = (preset, backend, dtype, repr(sorted(settings.items())))
    if key not in BUILT:
        BUILT[key] = built(preset, backend, dtype, settings), torch.get_rng_state()
    original, drawn = BUILT[key]
    torch.set_rng_state(drawn)
    return copy.deepcopy(original)


def built(preset: str, backend: str, dtype: torch.dtype, settings: dict[str, Any]) -> Mixer:
    node = copy.deepcopy(recipe(preset))
    plain = backend in ("torch", "recurrent")
    for each in parts(node):
        own = backend if plain or each is parts(node)[0] else "torch"  # of a memory and attention, the memory's
        chunked = issubclass(locate(each["regressor"]["_target_"]), Memory)
        late = each["regressor"].get("mass") is not None  # what is read comes from earlier mini-batches alone
        large = each["regressor"].get("grad_batch", 1) > (CHUNK if late else 2 * CHUNK)
        change(each, regressor__backend=own, **({"regressor__chunk": CHUNK} if chunked else {}))
        change(each, **({"regressor__grad_batch": CHUNK} if large else {}))
        if "shard" in each["regressor"]:
            change(each, regressor__shard=CHUNK - 2, regressor__local_batches=[CHUNK // 2])
    torch.manual_seed(1)
    return build(change(node, **settings), hidden_size=HIDDEN, layer_index=0).to(dtype)


@cache
def part(group: str, name: str) -> dict[str, Any]:
    """What conf/GROUP/NAME.yaml says, for mixer(preset, GROUP=...)."""
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))


def inputs(B: int, T: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    return torch.randn(B, T, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a state, in order; None counts as nothing."""
    if isinstance(state, Tensor):
        return [state]
    return [t for part in state for t in tensors(part)] if isinstance(state, tuple) else []


def outcome(
    m: Mixer, x: Tensor, splits: tuple[int, ...] = (), segments: Tensor | None = None, memory: bool = True
) -> list[Tensor]:
    """Outputs, the final memory, and the gradients of a fixed function of both to x and to every parameter; the
    sequence given in calls that end at `splits`. memory=False leaves the memory out."""
    x = x.detach().requires_grad_()
    state, outputs = None, []
    for a, b in pairwise([0, *splits, x.shape[1]]):
        y, state = m(x[:, a:b], state, None if segments is None else segments[:, a:b])
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    held = [t for t in tensors(state.memory) if t.is_floating_point()] if memory else []
    gradients = torch.autograd.grad(probe(y) + sum(t.square().sum() for t in held), [x, *m.parameters()])
    return [y, *held, *gradients]


def probe(y: Tensor) -> Tensor:
    """A number that depends on every output differently."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum()


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    assert len(a) == len(b)
    pairs = ((s, t) for s, t in zip(a, b, strict=True) if s.numel() or t.numel())
    return max(((s - t).abs().max() / t.abs().max().clamp(min=1)).item() for s, t in pairs)
