"""The arithmetic of many devices: what each holds and sends in a step, and how long that takes.

N parameters, of which a block has N_b and what is no block (embedding, head, last norm) N_r; W devices in R replicas of
S = W / R; A micro-batches a step. Parameters, gradients and AdamW's two moments have 4 bytes each, gradients that are
added up in bfloat16 2 (g bytes). All sums and gatherings go around a ring, in which a device sends (S - 1) / S of what
all have together, twice for a sum that all get (Patarasuk and Yuan 2009).

                       memory                  sent in a step
    ddp                16 N                    2 (W - 1) / W  g N
    fsdp, block        16 N / S                A (S - 1) / S (4 (2 N - N_r - N_b) + g N)
    fsdp, pass         16 N / S + 4 N          A (S - 1) / S (4 N + g N)
    fsdp, step         16 N / S + 8 N          (S - 1) / S (4 N + g N)
    hsdp               as fsdp, with S         as fsdp, and among replicas  2 (R - 1) / R  g N / S

A `block` also holds two gathered blocks at a time, 8 N_b.

A batch of B tokens is useful as long as it is not much larger than the gradient's noise scale B_c: to the same loss it
takes 1 + B / B_c times the tokens of the smallest batches (McCandlish et al. 2018, equation 2.7 and appendix D).
"""

from __future__ import annotations

from typing import NamedTuple

from data.batch import Batch
from models.training.speed import PEAK_FLOPS

# Bytes a second and direction: of a device to others of its node, from the makers' data sheets, by the names of
# models.training.speed.PEAK_FLOPS; NVLink through a switch, else PCI Express, for a bridge joins two devices alone.
INSIDE = {
    "B200": 900e9,
    "H200": 450e9,
    "H100 PCIe": 64e9,
    "H100 NVL": 64e9,
    "H100": 450e9,
    "A100": 300e9,
    "L40S": 32e9,
    "A6000": 32e9,
    "RTX 4090": 32e9,
    "RTX 3090": 32e9,
}
INFINIBAND = 50e9  # to other nodes: a card of 400 Gb/s for each device
NODE = 8  # devices


class Parameters(NamedTuple):
    """Of a model: all, of one block, and what is in no block."""

    all: int
    block: int
    root: int


class Placing(NamedTuple):
    """As conf/strategy has it. reduction: bytes of a gradient that is added up."""

    strategy: str
    devices: int
    replicas: int = 1
    whole_for: str = "block"
    reduction: int = 4

    @property
    def shards(self) -> int:
        return 1 if self.strategy == "ddp" else self.devices // self.replicas


class Sent(NamedTuple):
    """Bytes that a device sends in a step: of parameters that are gathered and of gradients that are divided, within
    its replica, and of gradients that are averaged among replicas."""

    gathered: float
    divided: float
    among: float

    def seconds(self, place: Placing, inside: float) -> float:
        """With nothing hidden behind a computation, and no time for the way of a first byte. inside: of INSIDE."""
        among = self.among / bandwidth(place.devices, place.shards, inside)
        return (self.gathered + self.divided) / bandwidth(place.shards, 1, inside) + among


def bandwidth(span: int, stride: int, inside: float) -> float:
    """Bytes a second that each device of a ring sends, which goes over every stride-th of `span` devices in a row. As
    many rings as a node has devices in it leave the node by as many cards, each with its part of the bytes."""
    return inside if span <= NODE else min(inside, INFINIBAND * max(1, NODE // stride))


def memory(n: Parameters, place: Placing) -> int:
    """Bytes of weights, gradients and AdamW on a device, and of what it holds gathered."""
    whole = {"block": 8 * n.block, "pass": 4 * n.all, "step": 8 * n.all}
    return 16 * n.all // place.shards + (whole[place.whole_for] if place.shards > 1 else 0)


def sent(n: Parameters, place: Placing, accumulation: int) -> Sent:
    S, copies = place.shards, place.devices // place.shards
    gathered = {"block": 2 * n.all - n.root - n.block}.get(place.whole_for, n.all)
    times = 1 if place.whole_for == "step" else accumulation
    part = times * (S - 1) / S
    among = 2 * (copies - 1) / copies * place.reduction * n.all / S
    return Sent(part * 4 * gathered, part * place.reduction * n.all, among)


def more_tokens(batch: int, noise_scale: float) -> float:
    """1 + B / B_c."""
    return 1 + batch / noise_scale


class Hire(NamedTuple):
    """What a run takes on devices of so many FLOP/s, at a share of these, for so much an hour and device."""

    seconds_of_a_step: float
    sending: float  # seconds of these
    hours: float
    cost: float


def hire(n: Parameters, place: Placing, batch: Batch, flops_per_token: int, gpu: str, mfu: float, price: float) -> Hire:
    """flops_per_token: to train. gpu: of PEAK_FLOPS. All sending is added, as if nothing of it were hidden behind the
    computation."""
    sending = sent(n, place, batch.accumulation).seconds(place, INSIDE[gpu])
    step = batch.tokens * flops_per_token / (place.devices * PEAK_FLOPS[gpu] * mfu) + sending
    hours = step * batch.num_steps / 3600
    return Hire(step, sending, hours, hours * place.devices * price)
