"""A sheet for renting GPUs: what a size holds, sends, takes and costs on 8 to 1,024 of them. Nothing is built but the
model without numbers, so that a laptop prints it.

    python scripts/renting.py --size 340m 1300m --devices 8 64 256 1024 --gpu H100 --mfu 0.3 --price 2.5

Prices and the share of the peak (MFU) are yours: a run prints its own MFU. A batch is that of the size, or one sequence
a device where there are more devices. docs/scaling.md has the formulas.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from omegaconf import OmegaConf

from data.batch import Batch, batch_arithmetic
from models.language_model import LanguageModelConfig
from models.training.speed import PEAK_FLOPS
from scripts.planning.memory import Planned
from scripts.planning.scaling import Parameters, Placing, hire, memory, more_tokens, sent
from scripts.recipes import CONF, composed

SIZES = sorted(path.stem for path in (CONF / "size").glob("*.yaml"))
VOCABULARY = 32_768
HEAD = (
    f"{'':<18}{'GPUs':>6}{'batch':>11}{'x acc':>6}{'GB held':>9}{'GB sent':>9}{'s/step':>8}{'sending':>9}"
    f"{'tokens':>8}{'hours':>10}{'cost':>12}"
)


def parameters(planned: Planned) -> Parameters:
    every = sum(p.numel() for p in planned.model.parameters())
    block = sum(p.numel() for p in planned.model.blocks[-1].parameters())
    return Parameters(every, block, every - sum(p.numel() for b in planned.model.blocks for p in b.parameters()))


def places(devices: int) -> dict[str, Placing]:
    found = {"ddp": Placing("ddp", devices)}
    for whole_for in ("block", "step"):
        found[f"fsdp, {whole_for}"] = Placing("fsdp", devices, 1, whole_for)
        if devices > 8:
            found[f"hsdp, {whole_for}"] = Placing("hsdp", devices, devices // 8, whole_for)
    return found


def batch_of(config: dict[str, Any], devices: int) -> Batch:
    """Of the size, or larger."""
    tokens = max(config["batch_tokens"], config["seq_len"] * devices)
    return batch_arithmetic(tokens, config["seq_len"], config["micro_batch"], devices, config["tokens"])


def sheet(size: str, given: argparse.Namespace) -> None:
    config: Any = OmegaConf.to_container(composed(given.model, f"size={size}"), resolve=True)
    planned = Planned(LanguageModelConfig(vocab_size=VOCABULARY, **config["model"]), "bf16-mixed")
    n, flops = parameters(planned), 3 * planned.model.flops_per_token(config["seq_len"])
    print(f"{size}: {n.all:,} parameters, {flops:,} FLOPs a token, {config['tokens']:,} tokens\n{HEAD}")
    for devices in given.devices:
        for name, place in places(devices).items():
            batch = batch_of(config, devices)
            found = hire(n, place, batch, flops, given.gpu, given.mfu, given.price)
            gb_sent, share = sum(sent(n, place, batch.accumulation)) / 1e9, found.sending / found.seconds_of_a_step
            more = more_tokens(batch.tokens, given.noise_scale) / more_tokens(config["batch_tokens"], given.noise_scale)
            print(
                f"{name:<18}{devices:>6}{batch.tokens:>11,}{batch.accumulation:>6}{memory(n, place) / 1e9:>9.1f}"
                f"{gb_sent:>9.2f}{found.seconds_of_a_step:>8.3f}{share:>9.1%}"
                f"{more:>8.2f}{found.hours * more:>10,.1f}{found.cost * more:>12,.0f}"
            )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gated_delta", help="a preset of conf/model")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["340m", "1300m"])
    parser.add_argument("--devices", nargs="+", type=int, default=[8, 64, 256, 1024])
    parser.add_argument("--gpu", choices=list(PEAK_FLOPS), default="H100")
    parser.add_argument("--mfu", type=float, default=0.3, help="share of the peak, of the computation alone (0.3)")
    parser.add_argument("--price", type=float, default=1.0, help="of a GPU and hour, in any currency (1)")
    parser.add_argument("--noise-scale", type=float, default=2**20, help="tokens; B_c of docs/scaling.md (1,048,576)")
    given = parser.parse_args()
    if not 0 < given.mfu <= 1:
        parser.error(f"--mfu {given.mfu:g} is a share of the peak: above 0, and 1 at most")
    if min(given.devices) < 1:
        parser.error(f"--devices {min(given.devices)} must be at least 1")
    print(f"{given.gpu} at {given.mfu:.0%} of {PEAK_FLOPS[given.gpu]:.3g} FLOP/s, {given.price:g} an hour and GPU")
    if not (CONF / "model" / f"{given.model}.yaml").exists():
        parser.error(f"--model {given.model} is not a preset of conf/model")
    for size in given.size:
        try:
            sheet(size, given)
        except ValueError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
