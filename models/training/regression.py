"""The inner regression while a model trains: a look into every memory at every validation (probe.py).

runs/NAME/regression.jsonl   a line for every mixer at every validation; docs/regression.md says what is in it
          regression.png     the newest lines as a picture (regression_plot.py)
          metrics.csv        regression/QUANTITY/layer_I: means over heads

The text is always the same, nothing is drawn at random, and there is neither gradient nor compilation: a run has the
same numbers with it and without, bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from models.training import probe
from models.training.logger import Tolerant
from models.training.module import Training, position_ranges
from models.training.regression_plot import draw
from models.training.summary import say

QUANTILES = (0.1, 0.5, 0.9)


def texts(samples: Sequence[dict[str, Tensor]], num_tokens: int, seq_len: int) -> Tensor:
    """About num_tokens of the validation set, [B, T]: the beginnings of rows that are evenly spaced over it, at least
    one and as long as in training, or all of num_tokens. What a row has of several documents counts as one.
    """
    length = min(seq_len, num_tokens)
    count = min(max(1, num_tokens // length), len(samples))
    return torch.stack([samples[i * len(samples) // count]["input_ids"][:length] for i in range(count)])


def ages_of(T: int) -> list[int]:
    """-1, which is before the write, 0, 1, 2, 4, ... up to half of T tokens."""
    return [-1, 0, *(1 << i for i in range(max(0, (T // 2).bit_length())))]


def row_of(seen: probe.Watched) -> dict[str, Any]:
    """What there is to say of a mixer, as docs/regression.md has it; lists are [H] or begin with heads."""
    regressor, tokens = seen.mixer.regressor, seen.tokens
    row: dict[str, Any] = {"layer": seen.layer, "part": seen.name, "regressor": type(regressor).__name__}
    quantities = dict(regressor.diagnostics())  # of the pass that was watched
    T = tokens.q.shape[1]
    ages, ranges, index = ages_of(T), position_ranges(T), torch.arange(T, device=tokens.q.device)
    reads, state = probe.reads(regressor, tokens, ages, seen.turn)
    losses = torch.stack([reads.loss((index >= a) & (index < b)) for a, b in ranges], dim=-1)  # [A, H, ranges]
    old = index < T - ages[-1]  # the pairs that are seen at every age
    loss, recall = reads.loss(old).T, reads.recall(old).T  # [H, A]
    row |= {"positions": ranges, "before": losses[0], "after": losses[1], "ages": ages[1:]}
    row |= {"loss": loss[:, 1:], "recall": recall[:, 1:], "loss_before": loss[:, 0], "recall_before": recall[:, 0]}
    for name, matrix in probe.matrices(regressor, state).items():
        quantities[f"norm_{name}"] = matrix.square().sum((-2, -1)).sqrt().mean(0)
        quantities[f"rank_{name}"] = probe.effective_rank(matrix).mean(0)
    if regressor.weighs_values:
        entropy, reach = (x[:, T // 2 :].mean((0, 1)) for x in probe.spread(probe.weights(regressor, tokens)[0]))
        quantities |= {"entropy": entropy, "reach": reach}
    spreads = {}
    for name, value in regressor.describe(tokens).items():
        if value.ndim == 3:
            spreads[name] = value
        quantities[name] = value.mean((0, 1)) if value.ndim == 3 else value
    if tokens.log_decay is not None:
        rate = -tokens.log_decay.transpose(0, 2).flatten(1).mean(1)
        quantities["half_life"] = math.log(2) / rate
        spreads["decay"] = tokens.log_decay.exp()
    row |= {"quantities": quantities, "quantiles": {name: _quantiles(value) for name, value in spreads.items()}}
    return _plain(row)


def _quantiles(x: Tensor) -> Tensor:
    """Over tokens and channels: [H, 3] of x [B, T, H] or [B, T, H, K]."""
    x = x.float().transpose(0, 2).flatten(1)
    return torch.quantile(x, torch.tensor(QUANTILES, dtype=x.dtype, device=x.device), dim=1).T


def _plain(node: Any) -> Any:
    """Numbers of five digits in lists, for JSON, which has none that are not finite: null."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, Tensor):
        return _plain(node.tolist())
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    if isinstance(node, float):
        return float(f"{node:.5g}") if math.isfinite(node) else None
    return node


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Of a row what goes to the loggers: means over heads."""
    where = f"layer_{row['layer']}" + (f"_{row['part']}" if row["part"] else "")
    oldest, last = row["ages"][-1], [of_head[-1] for of_head in row["recall"]]
    of_head = {"before": row["loss_before"], "after": [x[0] for x in row["loss"]], f"recall_at_{oldest}": last}
    found = {}
    for name, values in (of_head | row["quantities"]).items():
        numbers = [x for x in (values if isinstance(values, list) else [values]) if x is not None]
        if numbers:
            found[f"regression/{name}/{where}"] = sum(numbers) / len(numbers)
    return found


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a regression.jsonl."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class InnerRegression(Callback):
    """Looks at every mixer of the model at every validation of a fit.

    num_tokens: of the text (texts, above). picture_share: of the run's time, what pictures may take before the last,
    which is drawn in any case; None for no picture.
    """

    FILE = "regression.jsonl"

    def __init__(self, num_tokens: int = 512, picture_share: float | None = 0.005) -> None:
        if num_tokens < 2:
            raise ValueError(f"callbacks.regression.num_tokens={num_tokens} must be at least 2")
        if picture_share is not None and not 0 <= picture_share <= 1:
            said = f"callbacks.regression.picture_share={picture_share}"
            raise ValueError(f"{said} must be between 0 and 1, or null for no picture")
        self.num_tokens, self.picture_share = num_tokens, picture_share
        self.looks, self.looking, self.drawing, self.last = 0, 0.0, 0.0, 0.0
        self.rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keeps what was seen before the step that the run goes on from."""
        self.began = time.perf_counter()
        self.ids = texts(
            trainer.datamodule.task.validation_samples(), self.num_tokens, trainer.datamodule.batch.seq_len
        )
        self.path = Path(trainer.default_root_dir) / self.FILE
        before = read_rows(self.path) if trainer.global_rank == 0 and self.path.exists() else []
        self.rows = [row for row in before if row["step"] < trainer.global_step]

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Training)
        alone = trainer.global_rank and module.device_mesh is None  # a sharded model takes all ranks
        if trainer.sanity_checking or trainer.state.fn != "fit" or alone:
            return
        started = time.perf_counter()
        at = {"step": max(0, trainer.global_step - 1), "tokens": int(module.progress()["progress/tokens"])}
        names = module.model.config.layers
        rows = [at | {"mixer": names[row["layer"]]} | row for row in self._look(trainer, module)]
        if trainer.global_rank == 0:
            self.rows += rows
            self._write()
            module.log_dict({k: v for row in rows for k, v in scalars(row).items()}, rank_zero_only=True)
        self.looks, self.looking = self.looks + 1, self.looking + time.perf_counter() - started

    def _look(self, trainer: L.Trainer, module: Training) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        # not compiled: that would compile for these shapes, beside those of training
        eager, precision = torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context()
        watching = probe.watching(module.model.blocks, lambda seen: rows.append(row_of(seen)))
        with torch.no_grad(), eager, precision, watching:
            module.model(self.ids.to(module.device), logits_to_keep=1)
        return rows

    def _write(self) -> None:
        draft = self.path.with_name(f".{self.path.name}.draft")
        try:
            draft.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            draft.replace(self.path)
        except OSError as error:  # a full disk: no reason to end a run; the next look writes all
            print(f"warning: {self.path} could not be written ({error.strerror})", flush=True)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.picture_share is None:
            return
        if self.drawing + self.last <= self.picture_share * (time.perf_counter() - self.began):
            self._draw(trainer)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._draw(trainer)
        if trainer.global_rank == 0 and self.looks:
            total = time.perf_counter() - self.began
            cost = f"{self.looking:.1f} s for {self.looks} looks, {self.looking / total:.1%} of the run"
            say(f"regression {cost}; {self.drawing:.1f} s for pictures")

    def _draw(self, trainer: L.Trainer) -> None:
        if trainer.global_rank or self.picture_share is None or not self.rows:
            return
        started, picture = time.perf_counter(), self.path.with_suffix(".png")
        try:
            draw(self.rows, picture)
        except OSError as error:
            print(f"warning: {picture.name} could not be written ({error.strerror})", flush=True)
            return
        for logger in trainer.loggers:
            if isinstance(logger, Tolerant):
                logger.log_image("regression/picture", picture, self.rows[-1]["step"])
        self.last = time.perf_counter() - started
        self.drawing += self.last
