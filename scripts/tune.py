"""Finds the launches of fla's kernels that are fastest on this GPU, and keeps them in the repository.

    python scripts/tune.py [--only NAME ...] [--sizes 50m 340m] [--ms 50] [--output models/kernels/tuned/NAME.json]
    python scripts/tune.py --compile [...]

Of each preset whose memory is computed by fla, one layer goes forward and backward at each size, in bf16 over its
micro-batch; every candidate that fla offers is compiled, all at once, and timed for so many milliseconds. A model of
fla's own has its name of scripts/benchmark.py, fla.gated_deltanet, and goes through two layers and its loss, so that
the benchmark finds it at its best. What is found is added to the table of this GPU and these releases of Triton and
fla, in place of what it had for the same kernels and keys (models/kernels/tuning.py, which says what a key is). Time it
on a GPU that nothing else uses. --compile only fills Triton's cache: several processes can do that at a time, for one
that times then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from models.build import build
from models.kernels import ahead, tuning
from models.mixers.mixer import Mixer
from scripts.benchmarks.contenders import PEERS, PRESETS, batch_of, half, sizes_of, theirs
from scripts.recipes import CONF, composed

DEVICE = torch.device("cuda")
PEERS_OF_FLA = [name for name, peer in PEERS.items() if peer.gpu]
Found = list[tuple[Any, Any]]  # kernels of Triton's class, and keys that they were tuned for


def layers_of(cfg: DictConfig) -> Iterator[Mixer]:
    """A layer of each kind of the model whose memory fla computes."""
    for node in cfg.model.mixers.values():
        settings: Any = OmegaConf.to_container(node, resolve=True)
        layer = build(settings, hidden_size=cfg.model.hidden_size, layer_index=0)
        if isinstance(layer, Mixer) and layer.regressor.choose(DEVICE, torch.bfloat16).backend == "fla":
            yield layer.to(DEVICE)


def call(layer: nn.Module, x: Tensor) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y, _ = layer(x)
    y.sum().backward()


def works(name: str, size: str) -> Iterator[Callable[[], None]]:
    """What calls the kernels of a preset, layer by layer, or of a model of fla's own."""
    if name in PEERS_OF_FLA:
        sizes = sizes_of(size)._replace(layers=2)
        peer, batch = theirs(name, sizes, DEVICE.type), batch_of(sizes, DEVICE.type, documents=False)
        yield partial(step, peer.loss, batch)
        return
    cfg = composed(name, f"size={size}")
    for layer in layers_of(cfg):
        x = torch.randn(cfg.micro_batch, cfg.seq_len, cfg.model.hidden_size, device=DEVICE).bfloat16()
        yield partial(call, layer, x)


def step(loss: Callable[[Any], Tensor], batch: Any) -> None:
    with half(DEVICE.type):
        value = loss(batch)
    value.backward()


def timed(ms: float) -> Found:
    """From here on all of fla's kernels are tuned anew, and come into this list. Their results in Triton's cache may be
    of a GPU that others used."""
    import triton
    from triton.runtime.autotuner import Autotuner

    found: Found = []

    def check(kernel: Any, key: Any, candidates: list[Any], time_them: Any) -> bool:
        time_them()
        found.append((kernel, key))
        return False

    kind: Any = Autotuner
    kind.check_disk_cache = check
    kind.do_bench = staticmethod(partial(triton.testing.do_bench, warmup=ms / 4, rep=ms))
    os.environ["FLA_CACHE_MODE"] = "disabled"  # no table, fla's or ours
    tuning.side_by_side()
    return found


def launches(found: Found) -> dict[str, dict[str, dict[str, Any]]]:
    """By kernel and key, as in a table."""
    by_kernel: dict[str, dict[str, dict[str, Any]]] = {}
    for kernel, key in found:
        if (described := tuning.described(kernel, key)) is not None:
            by_kernel.setdefault(tuning.name_of(kernel), {})[described] = kernel.cache[key].all_kwargs()
    return by_kernel


def added(path: Path, found: dict[str, dict[str, dict[str, Any]]]) -> tuning.Table:
    """The table of this machine with them. Raises ValueError where the file is of another."""
    place, gpu = tuning.here(), torch.cuda.get_device_name()
    table = tuning.read(path) if path.exists() else tuning.Table(gpu, *place, launches={})
    if (table.gpu, *table.fits) != (gpu, *place):
        raise ValueError(f"{path} is of {table.gpu}, {' '.join(map(str, table.fits))}; name another file")
    merged = {name: table.launches.get(name, {}) | found.get(name, {}) for name in table.launches | found}
    return table._replace(launches={name: dict(sorted(merged[name].items())) for name in sorted(merged)})


def written(table: tuning.Table) -> str:
    """JSON with a line for each launch."""
    text = json.dumps(table._asdict(), indent=1)
    return re.sub(r"\{[^{}]*\}|\[[^][]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PRESETS, *PEERS_OF_FLA]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=PRESETS, metavar="NAME", help="default: all presets"
    )
    parser.add_argument("--sizes", nargs="+", choices=sorted(x.stem for x in (CONF / "size").glob("*.yaml")))
    parser.add_argument("--ms", type=float, default=50.0, help="for which each candidate is timed")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--output", type=Path, help="the table; default: that of this machine")
    given = parser.parse_args()
    if not given.ms > 0:
        parser.error(f"--ms {given.ms} must be above 0")
    if not torch.cuda.is_available():
        sys.exit("error: launches are tuned on a GPU, and there is none here")
    file = re.sub(r"\W+", "_", f"{torch.cuda.get_device_name()} triton {tuning.here()[1]}".lower())
    output = given.output or tuning.FOLDER / f"{file}.json"
    found = timed(given.ms)
    for size in given.sizes or ("50m", "340m"):
        for name in given.only:
            for work in works(name, size):
                began, before = time.perf_counter(), len(found)
                with ahead.compiled():
                    work()
                compiled = time.perf_counter()
                if not given.compile:
                    work()
                seconds = f"{compiled - began:.1f} s to compile, {time.perf_counter() - compiled:.1f} to time"
                print(f"{name} {size}: {len(found) - before} kernels and keys, {seconds}", flush=True)
                if len(found) == before:
                    continue
                try:
                    output.write_text(written(added(output, launches(found))), encoding="utf-8")
                except ValueError as error:
                    sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
