"""micro_batch=auto: how many sequences fit into the GPU's memory at once, found by trying, and remembered.

Before anything of the run is built, one forward and backward pass of more and more sequences is tried. Its layers are
not compiled and keep more than compiled ones, and as much memory is taken beside as the optimizer's state will need.
The numbers are those that divide a device's sequences of a step. What is found is kept in the cache by model, data,
precision and GPU: it is tried once, whatever the run, and by one process of a machine. On a CPU nothing is tried.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from conf import schema
from conf.checks import device, dtype
from data.batch import batch_arithmetic
from data.module import collate
from data.shards import cache_folder
from models.build import build
from models.language_model import LanguageModel, LanguageModelConfig
from models.training.recompute import USABLE
from models.training.summary import say

AUTO = "auto"
ON_A_CPU = 8  # sequences, at most
SAME = ("model", "data", "tokenizer", "seq_len", "context_parallel")  # what the memory of a pass depends on


def settle(cfg: DictConfig, kind: Callable[[Any], type[LanguageModel]]) -> None:
    """Puts a number in the place of micro_batch=auto. kind: of the task's model. Raises ValueError for mistakes."""
    if cfg.micro_batch != AUTO:
        return
    world = schema.world_size(cfg.trainer.devices, cfg.trainer.num_nodes)
    batch = batch_arithmetic(cfg.batch_tokens, cfg.seq_len, 1, world, cfg.tokens, cfg.context_parallel)
    possible = [n for n in range(1, batch.accumulation + 1) if batch.accumulation % n == 0]
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    if device(plain["trainer"]).type == "cpu":
        cfg.micro_batch = max(n for n in possible if n <= ON_A_CPU)
        return
    path = cache_folder() / "micro_batch.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    key = key_of(plain, possible, torch.cuda.get_device_properties(where))
    with FileLock(path.with_suffix(".lock")):  # of several processes the first one tries, and the others read
        known = json.loads(path.read_text()) if path.exists() else {}
        if key not in known:
            known[key] = largest(possible, Trial(plain, kind, where).fits)
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(known, indent=1) + "\n")
            draft.replace(path)
    cfg.micro_batch = known[key]
    say(f"memory    micro_batch={known[key]} (micro_batch=auto; kept in {path})")


def key_of(config: dict[str, Any], possible: Sequence[int], gpu: Any) -> str:
    """Of all that the answer depends on."""
    parts = [config[name] for name in SAME] + [config["trainer"]["precision"], config["optimizer"], list(possible)]
    said = json.dumps([*parts, gpu.name, gpu.total_memory, torch.__version__], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def largest(possible: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Of these numbers, which grow, the last that fits before one that does not; the first in any case: where that does
    not fit, recompute=auto may help, and else the run says what to lower."""
    found = possible[0]
    for n in possible:
        if not fits(n):
            break
        found = n
    return found


class Trial:
    """A pass over the first sequences of the run's data."""

    def __init__(self, config: dict[str, Any], kind: Callable[[Any], type[LanguageModel]], where: torch.device) -> None:
        self.config, self.where = config, where
        self.task = build(config["data"], tokenizer=build(config["tokenizer"]), seq_len=config["seq_len"])
        self.task.prepare(config["num_workers"])
        self.samples = self.task.train_samples()
        self.model_of = kind(self.task)

    def fits(self, sequences: int) -> bool:
        """Leaves no memory taken, and no random number drawn."""
        with torch.random.fork_rng([self.where.index]), torch.cuda.device(self.where):
            torch.cuda.reset_peak_memory_stats()
            try:
                self._pass(sequences)
            except torch.OutOfMemoryError:
                return False
            finally:
                most = torch.cuda.max_memory_allocated()
                torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            return most <= USABLE * free

    def _pass(self, sequences: int) -> None:
        model: Any = self.model_of(LanguageModelConfig(vocab_size=self.task.vocab_size, **self.config["model"]))
        model.to(device=self.where)
        state = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]  # AdamW's two moments
        batch = collate([self.samples[i % len(self.samples)] for i in range(sequences)])
        length = self.config["seq_len"] // self.config["context_parallel"]
        parts = [batch[name] for name in ("input_ids", "labels", "segments")]
        inputs = [x if x is None else x[:, :length].to(self.where) for x in parts]
        products = dtype(self.config["trainer"]["precision"])
        with torch.autocast("cuda", products, enabled=products is not torch.float32):
            loss = model.sum_nats(*inputs)
        loss.backward()
        del state
