"""What runs beside the training: speed, a sample of text, a picture of the loss."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from tqdm import tqdm

from models.training.logger import CsvLogger, read_metrics
from models.training.module import Training, position_ranges

# Dense bf16 tensor-core peaks in FLOP/s, from the makers' data sheets (which headline twice as much, for 2:4 sparsity),
# by what torch calls the device. The first name that occurs in the device's is taken.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Throughput(Callback):
    """Tokens per second, MFU and memory, over the steps since the last report (validation and checkpoints left out).

    MFU = 3 * forward FLOPs per token * tokens/s / (devices * dense peak), with the FLOPs counted from the model
    (LanguageModel.flops_per_token).
    """

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Training)
        batch = trainer.datamodule.batch
        self.tokens_per_step, self.num_devices = batch.tokens, batch.world_size
        self.flops_per_token = 3 * module.model.flops_per_token(batch.seq_len)
        self.peak = peak_flops(module.device)
        self.steps = 0
        self.started: float | None = None
        self.rates: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self.steps += 1
        if trainer.global_step % trainer.log_every_n_steps == 0 and self.started is not None:
            self._report(trainer, module, self.started)

    def _report(self, trainer: L.Trainer, module: L.LightningModule, started: float) -> None:
        """Waits for the GPU, so that what was timed is what was done."""
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        seconds = time.perf_counter() - started
        rate = self.steps * self.tokens_per_step / seconds
        self.rates.append(rate)
        metrics = {
            "speed/tokens_per_second": rate,
            "progress/tokens": float(trainer.global_step * self.tokens_per_step),
        }
        metrics["progress/flops"] = metrics["progress/tokens"] * self.flops_per_token
        if self.peak is not None:
            metrics["speed/mfu"] = rate * self.flops_per_token / (self.peak * self.num_devices)
        if module.device.type == "cuda":
            metrics["speed/peak_memory_gb"] = torch.cuda.max_memory_allocated(module.device) / 1e9
        module.log_dict(metrics, rank_zero_only=True)
        self.steps, self.started = 0, None

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps, self.started = 0, None  # a window that validation interrupts is not reported

    def summary(self) -> str:
        """One line for the end of the run: the median of the reports."""
        if not self.rates:
            return "too short a run to measure its speed"
        rate = sorted(self.rates)[len(self.rates) // 2]
        text = f"{rate:,.0f} tokens/s"
        if self.peak is not None:
            text += f", MFU {rate * self.flops_per_token / (self.peak * self.num_devices):.1%}"
        return text


class Progress(Callback):
    """A bar of steps where there is a terminal, and a line at every validation wherever the output goes."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        total, self.started, self.first = trainer.max_steps, time.perf_counter(), trainer.global_step
        hidden = trainer.global_rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=self.first, unit="step", dynamic_ncols=True, leave=False, disable=hidden)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.bar.update(trainer.global_step - self.bar.n)
        if not self.bar.disable and trainer.global_step % trainer.log_every_n_steps == 0:
            shown = {"train/loss": "loss", "validation/bits_per_byte": "bits/byte", "validation/accuracy": "accuracy"}
            found = trainer.callback_metrics
            self.bar.set_postfix({label: f"{float(found[name]):.3f}" for name, label in shown.items() if name in found})

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_rank or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        step, total, found = trainer.global_step, trainer.max_steps, trainer.callback_metrics
        seconds = time.perf_counter() - self.started
        left = seconds * (total - step) / max(1, step - self.first)
        parts = [f"step {step:>{len(f'{total:,}')},} of {total:,}"]
        if "train/loss" in found:
            parts.append(f"loss {float(found['train/loss']):.3f}")
        for name, label in {"validation/bits_per_byte": "bits per byte", "validation/accuracy": "accuracy"}.items():
            if name in found:
                parts.append(f"validation {float(found[name]):.3f} {label}")
        parts.append(f"{timedelta(seconds=round(seconds))} gone, {timedelta(seconds=round(left))} left")
        self.bar.write("   ".join(parts))

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.bar.close()


class Sample(Callback):
    """Goes on with the beginning of a validation text, at the end of the run, until the model ends the text or for
    num_tokens: printed, and kept in sample.txt. The beginning is of one document, and at most half of it.
    """

    def __init__(self, num_tokens: int = 256, num_prompt_tokens: int = 64, temperature: float = 0.8) -> None:
        if num_tokens < 1 or num_prompt_tokens < 1:
            raise ValueError(
                f"callbacks.sample.num_tokens={num_tokens} and num_prompt_tokens={num_prompt_tokens} must be at least 1"
            )
        if temperature <= 0:
            raise ValueError(f"callbacks.sample.temperature={temperature} must be positive")
        self.num_tokens, self.num_prompt_tokens, self.temperature = num_tokens, num_prompt_tokens, temperature

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Training)
        task = trainer.datamodule.task
        if task.tokenizer is None or trainer.global_rank or trainer.interrupted or module.device_mesh is not None:
            return
        device = trainer.strategy.root_device  # from which Lightning has taken the model by now
        sample = task.validation_samples()[0]
        length = int((sample["segments"] == 0).sum())
        prompt = sample["input_ids"][: max(1, min(self.num_prompt_tokens, length // 2))].to(device)
        model = module.model.to(device).eval()
        devices = [device] if device.type == "cuda" else []
        # not compiled: a token at a time is another shape, and soon over
        eager, precision = torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context()
        with torch.random.fork_rng(devices=devices), eager, precision:
            torch.manual_seed(0)
            try:
                ids = model.generate(
                    prompt.unsqueeze(0),
                    attention_mask=torch.ones_like(prompt).unsqueeze(0),
                    max_new_tokens=self.num_tokens,
                    do_sample=True,
                    temperature=self.temperature,
                    logits_processor=[_finite],
                )[0]
            except FloatingPointError as error:
                print(f"warning: no sample.txt, since {error}", flush=True)
                return
        start, text = (task.tokenizer.decode(part.tolist()) for part in (ids[: len(prompt)], ids[len(prompt) :]))
        (Path(trainer.default_root_dir) / "sample.txt").write_text(f"{start}{text}\n", encoding="utf-8")
        print(f"\nAfter {trainer.global_step:,} steps, a validation text ...\n\n{start}\n\n... goes on:\n\n{text}\n")


def _finite(ids: Tensor, scores: Tensor) -> Tensor:
    """The scores of the next token. Raises FloatingPointError where no token can be drawn by them."""
    if scores.isnan().any() or scores.isposinf().any():
        raise FloatingPointError(f"the model's output is not finite after {ids.shape[1]} tokens")
    return scores


class LossPlot(Callback):
    """loss.png: training and validation loss against tokens, and the loss by position in the sequence at the end."""

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._draw(trainer)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        path = Path(trainer.default_root_dir) / CsvLogger.FILE
        if trainer.global_rank or trainer.sanity_checking or not path.exists():
            return
        batch = trainer.datamodule.batch
        if rows := read_metrics(path):
            try:
                draw_loss(rows, batch.tokens, batch.seq_len, path.with_name("loss.png"))
            except OSError as error:  # a full disk: no reason to end a run
                print(f"warning: loss.png could not be written ({error.strerror})", flush=True)


def draw_loss(rows: list[dict[str, float]], tokens_per_step: int, seq_len: int, path: Path) -> None:
    """Two panels from the rows of metrics.csv."""
    from matplotlib.figure import Figure  # half a second that no other command should pay

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])

    def curve(name: str) -> tuple[list[float], list[float]]:
        points = [((row["step"] + 1) * tokens_per_step, row[name]) for row in rows if name in row]
        return [x for x, _ in points], [y for _, y in points]

    left.plot(*curve("train/loss"), color="0.7", linewidth=0.8, label="training")
    left.plot(*curve("validation/nats"), color="C0", marker="o", markersize=3, label="validation")
    left.set(xlabel="tokens", ylabel="loss, nats per token", title="Loss")
    left.legend(frameon=False)
    last = next((row for row in reversed(rows) if "validation/nats" in row), {})
    ranges = [(a, b, last.get(f"validation/nats_at/{a}-{b - 1}")) for a, b in position_ranges(seq_len)]
    drawn = [(a, b, y) for a, b, y in ranges if y is not None]
    if drawn:
        edges = [*(a for a, _, _ in drawn), drawn[-1][1]]
        right.stairs([y for _, _, y in drawn], edges, baseline=None, color="C0")
    right.set(
        xscale="symlog", xlabel="position in the sequence", ylabel="nats per token", title="Validation loss by position"
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, dpi=120, format="png")
    draft.replace(path)
