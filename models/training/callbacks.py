"""What runs beside the training: a sample of text, a picture of the loss."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from models.training.logger import CsvLogger, Tolerant, read_metrics
from models.training.module import Training, position_ranges


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
        # not compiled, nor captured: a token at a time is another shape, and soon over
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
                    disable_compile=True,
                )[0]
            except FloatingPointError as error:
                print(f"warning: no sample.txt, since {error}", flush=True)
                return
        start, text = (task.tokenizer.decode(part.tolist()) for part in (ids[: len(prompt)], ids[len(prompt) :]))
        (Path(trainer.default_root_dir) / "sample.txt").write_text(f"{start}{text}\n", encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, Tolerant):
                logger.log_sample(start, text, trainer.global_step - 1)
        print(f"\nAfter {trainer.global_step:,} steps, a validation text ...\n\n{start}\n\n... goes on:\n\n{text}\n")


def _finite(ids: Tensor, scores: Tensor) -> Tensor:
    """The scores of the next token. Raises FloatingPointError where no token can be drawn by them."""
    if scores.isnan().any() or scores.isposinf().any():
        raise FloatingPointError(f"the model's output is not finite after {ids.shape[1]} tokens")
    return scores


class LossPlot(Callback):
    """loss.png: training and validation loss against tokens, and the loss by position in the sequence at the end."""

    FILE = "loss.png"

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._draw(trainer)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._draw(trainer)
        picture = Path(trainer.default_root_dir) / self.FILE
        for logger in trainer.loggers:
            if isinstance(logger, Tolerant) and trainer.global_rank == 0 and picture.exists():
                logger.log_image("loss", picture, trainer.global_step - 1)

    def _draw(self, trainer: L.Trainer) -> None:
        path = Path(trainer.default_root_dir) / CsvLogger.FILE
        if trainer.global_rank or trainer.sanity_checking or not path.exists():
            return
        batch = trainer.datamodule.batch
        if rows := read_metrics(path):
            try:
                draw_loss(rows, batch.tokens, batch.seq_len, path.with_name(self.FILE))
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
