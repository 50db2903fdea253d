"""The LightningModule: a language model, its optimizer, and what is logged about both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from data.mixture import Source, by_source, together
from models.context import Context
from models.language_model import LanguageModel
from models.loss import IGNORED
from models.mixers.baselines import Baseline
from models.mixers.mixer import Mixer
from models.parts.precision import product_dtype
from models.regression.regressor import Regressor
from models.training import points
from models.training.captured import Captured, refusal
from models.training.guards import Guard
from models.training.optimizer import clip
from models.training.parallel import DDP, Sharded
from models.training.preemption import Preemption
from models.training.recompute import Recompute
from models.training.rehearsal import rehearse, start_compilers
from models.training.summary import say


class Training(L.LightningModule):
    """Minimises the mean of -log p(next token).

    optimizer, schedule: constructors, optimizer(model) and schedule(num_steps) -> factor(step).
    clip_norm: gradients whose norm over all parameters is longer are shortened to it; the norm before is logged.
    targets_per_token: how many positions have a target, on average (1 for text). Losses are divided by this constant
        times the tokens, never by a count that differs between micro-batches, so that every split of a batch gives the
        same gradient. None where all sequences of a step have equally many: by their number.
    bytes_per_token: of the validation text, for bits per byte; None where there is no text.
    sources: the parts of a mixture, each of which is validated by itself too; none elsewhere.
    chance: the accuracy of a guess, for a task that has right answers; logged beside the model's.
    compile_blocks, cuda_graph: whether the blocks are compiled, and a micro-batch is one CUDA graph (captured.py).
    guard, preemption: what is asked about every step, and told.
    context_parallel: how many processes share each sequence (models/context.py).
    recompute: which blocks are computed again in the backward pass (recompute.py).
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., Callable[[int], float]],
        num_steps: int,
        clip_norm: float,
        targets_per_token: float | None = 1.0,
        bytes_per_token: float | None = None,
        chance: float | None = None,
        sources: Sequence[Source] = (),
        compile_blocks: bool = False,
        cuda_graph: bool = False,
        guard: Guard | None = None,
        preemption: Preemption | None = None,
        recompute: str | int = "none",
        context_parallel: int = 1,
    ) -> None:
        super().__init__()
        if clip_norm <= 0:
            raise ValueError(f"clip_norm={clip_norm} must be positive; a large one switches clipping off")
        self.model = model
        self.optimizer, self.schedule = optimizer, schedule(num_steps=num_steps)
        self.num_steps, self.clip_norm = num_steps, clip_norm
        self.targets_per_token, self.bytes_per_token, self.chance = targets_per_token, bytes_per_token, chance
        self.sources = sources
        self.compile_blocks, self.cuda_graph = compile_blocks, cuda_graph
        self.guard, self.preemption = guard or Guard(), preemption or Preemption()
        self.recompute = Recompute(model, recompute)
        self.context_parallel = context_parallel
        self.context: Context | None = None  # known when the processes have met
        self._begun = False
        self.flops_per_token = 0  # to train, known when the sequences are
        self.loss = math.nan  # of the last step, in nats per token
        self.first_step, self.began = 0, time.time()  # of this process
        self._sharded = False
        self._window: list[Tensor] = []  # [loss, number of targets] of the micro-batches since the last step
        # [nats, targets, right ones] by position, of each loader and, of a mixture, each part
        self._validation: dict[tuple[int, int], Tensor] = {}
        self.captured: Captured | None = None
        self._told: dict[str, Tensor] = {}  # by the regressors, in the captured pass

    def configure_model(self) -> None:
        """Shards the parameters under strategy=fsdp and hsdp. Lightning calls this before fit and before validate."""
        if self._sharded:
            return
        if self.compile_blocks:
            start_compilers()
            # which backend runs is settled before anything is compiled, not part of the graph
            for chooser in (Mixer, Regressor):
                chooser.choose = torch.compiler.assume_constant_result(chooser.choose)
            for block in self.model.blocks:
                # rows are not padded to multiples of 128 bytes: a copy would take that off before each of our kernels
                block.compile(options={"comprehensive_padding": False})
            self.model.alike = True
        if self.device_mesh is not None:
            cast("Sharded", self.trainer.strategy).shard(self.model, self.model.blocks, ("sum_nats", "score"))
        self._sharded = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.guard.load_state_dict(checkpoint["guard"])

    def on_train_batch_start(self, batch: dict[str, Tensor | Any], batch_idx: int) -> None:
        """Before the first step of this process it is settled which blocks are recomputed."""
        if self._begun:
            return
        self._begun = True
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        strategy, more = self.trainer.strategy, 0
        if isinstance(strategy, Sharded) and self.trainer.accumulate_grad_batches > 1:
            more = strategy.held_between(sum(p.numel() for p in self.model.parameters()))
        if self.device_mesh is None and self.context is None:  # in whose blocks processes meet
            with self.trainer.precision_plugin.forward_context():
                dtype = product_dtype(self.model.embedding.weight)
            rehearse(self.model, partial(self._nats, batch), self.device, dtype)
        say(self.recompute.begin(partial(self._nats, batch), optimizer, self.device, more))

    def _nats(self, batch: dict[str, Tensor | Any]) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            return self._of_tokens(self.model.sum_nats, batch)[0]

    def _of_tokens(self, function: Callable[..., Any], batch: dict[str, Tensor | Any]) -> tuple[Any, Tensor]:
        """function(input_ids, labels, segments) of this process's tokens, and these labels: of all tokens, where it
        shares no sequences. What one process asks the model beside this is not shared.
        """
        parts = [batch["input_ids"], batch["labels"], batch["segments"]]
        if self.context is not None:
            self.context.begin(parts[0], parts[2])
            parts = [x if x is None else self.context.share(x) for x in parts]
        self.model.context = self.context
        try:
            return function(*parts), parts[1]
        finally:
            self.model.context = None

    def training_step(self, batch: dict[str, Tensor | Any], index: int) -> Tensor:
        """The loss. With `captured` nothing yet: Lightning sets gradients to None after this, and before `backward`."""
        if self.captured is not None:
            self._batch = batch
            return torch.zeros((), device=self.device)
        loss, sums = self._loss(batch)
        self._window.append(sums)
        return loss

    def backward(self, loss: Tensor, *arguments: Any, **others: Any) -> None:
        if self.captured is None:
            return super().backward(loss, *arguments, **others)
        sums, self._told = self.captured(self._batch)
        self._window.append(sums.clone())

    def _loss(self, batch: dict[str, Tensor | Any]) -> tuple[Tensor, Tensor]:
        """What is minimised, and [loss, number of targets] of the micro-batch."""
        nats, labels = self._of_tokens(self.model.sum_nats, batch)
        count, share = (labels != IGNORED).sum(), self.targets_per_token
        return nats / (count if share is None else labels.numel() * share), torch.stack([nats.detach(), count])

    def _captured(self) -> Captured:
        pieces = self.trainer.accumulate_grad_batches

        def forward(batch: dict[str, Tensor | Any]) -> tuple[Tensor, Any]:
            loss, sums = self._loss(batch)
            return loss / pieces, (sums, self._regressors())

        return Captured(forward, self.model.parameters(), self.trainer.precision_plugin.forward_context)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Once a step: clips by the norm over all parameters, and logs it with the loss over the whole batch, all
        micro-batches and ranks. (Lightning's own clipping refuses a fused optimizer under bf16-mixed.)

        Here all ranks learn the same about the step, with one all-reduce and one wait for the GPU: what it is worth,
        and whether one of them was asked to stop.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if isinstance(self.trainer.strategy, DDP):
            self.trainer.strategy.average([p.grad for p in parameters if p.grad is not None])
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        window, self._window = torch.stack(self._window).sum(0), []
        votes = self.preemption.votes()
        if torch.distributed.is_initialized():  # else they stay here: to copy them there is to wait for the GPU twice
            window = _sum_over_ranks(torch.cat([window, window.new_tensor(votes)]))
        whole_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nats, count, *told, length = torch.cat([window, whole_norm.view(1)]).tolist()
        self.preemption.agree(told or votes)
        step, self.loss = self.trainer.global_step + 1, nats / max(count, 1)
        if self.guard.accepts(step, self.loss, length, self.model.named_parameters()):
            clip(parameters, self.clip_norm, norm, length)
        else:
            optimizer.zero_grad()  # and an optimizer passes over what has no gradient
        if step % self.trainer.log_every_n_steps:
            return
        self.log_dict(
            {
                "train/loss": self.loss,
                "train/gradient_norm": length,
                "train/learning_rate": optimizer.param_groups[0]["lr"],
                **self.progress(step),
                **self.guard.metrics(),
                **{name: x.item() for name, x in (self._told or self._regressors()).items()},
            }
        )

    def setup(self, stage: str) -> None:
        if self.context_parallel > 1 and self.context is None:
            self.context = Context(self.context_parallel)
        self.flops_per_token = 3 * self.model.flops_per_token(self.trainer.datamodule.batch.seq_len)

    def progress(self, steps: int | None = None) -> dict[str, float]:
        """The tokens that were trained on in so many steps (None: all so far), and the FLOPs that this took: forward,
        and twice as many backward."""
        steps = self.trainer.global_step if steps is None else steps
        tokens = float(steps * self.trainer.datamodule.batch.tokens)
        return {"progress/tokens": tokens, "progress/flops": tokens * self.flops_per_token}

    def _regressors(self) -> dict[str, Tensor]:
        """What the regressors tell of their last forward pass (regressor.py), layer by layer."""
        return {
            f"{name}/layer_{i}": value
            for i, block in enumerate(self.model.blocks)
            if not isinstance(block.mixer, Baseline)
            for name, value in block.mixer.regressor.diagnostics().items()
        }

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer(self.model)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.schedule), "interval": "step"},
        }

    def on_train_start(self) -> None:
        """The rate is what the schedule says: the checkpoint may be of a run of another length (branch.py)."""
        self.first_step, self.began = self.trainer.global_step, time.time()
        scheduler: Any = self.lr_schedulers()
        if self.cuda_graph and (why := refusal(self.trainer, self.context_parallel)) is None:
            self.captured = self._captured()
        elif self.cuda_graph and self.device.type == "cuda":
            say(f"cuda_graph has no effect here: {why}")
        for group, peak in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = peak * self.schedule(self.trainer.global_step)

    # validation: sums over a fixed set of tokens, so the result is the same for every world size and micro-batch

    def on_validation_epoch_start(self) -> None:
        self._validation = {}

    def validation_step(self, batch: dict[str, Tensor | Any], index: int, dataloader_idx: int = 0) -> None:
        """Loader 0 has the validation set, the others have the task's test points."""
        # a test point has a length of its own, for which nothing is compiled
        with torch.compiler.set_stance("force_eager") if dataloader_idx else nullcontext():
            (nats, predictions), labels = self._of_tokens(self.model.score, batch)
        kept = labels != IGNORED
        sums = torch.stack([nats.double().sum(0), kept.double().sum(0)])  # [2, T]
        if self.bytes_per_token is None and not labels.is_floating_point():  # a task with right answers: how often
            right = predictions == labels
            if (answers := batch.get("right")) is not None:  # several, as bits (data/made.py)
                answers = answers if self.context is None else self.context.share(answers)
                right = (answers >> predictions & 1).bool()
            sums = torch.cat([sums, (right & kept).double().sum(0, keepdim=True)])
        if self.context is not None:
            sums = self.context.among_all(sums)
        key = dataloader_idx, int(batch.get("part", 0))
        self._validation[key] = self._validation[key] + sums if key in self._validation else sums

    def on_validation_epoch_end(self) -> None:
        found = {key: _sum_over_ranks(self._validation[key]) for key in sorted(self._validation)}
        parts = [
            part for loader, part in found if loader == 0
        ]  # not all where trainer.limit_val_batches ends it before
        each = torch.stack([found.pop((0, part)) for part in parts])  # [parts, 2 or 3, T]
        sources = [self.sources[part] for part in parts] if self.sources else []
        sums = together(each, sources) if sources else each[0]
        nats, count = sums[0], sums[1]
        mean = (nats.sum() / count.sum()).item()
        # `step` is Lightning's key for the row this belongs to: that of the step just taken
        metrics = {
            "step": float(max(0, self.trainer.global_step - 1)),
            "validation/nats": mean,
            "validation/perplexity": math.exp(min(mean, 700.0)),
            **self.progress(),
            **(by_source(each, sources) if sources else {}),
        }
        if self.bytes_per_token is not None:
            metrics["validation/bits_per_byte"] = mean / math.log(2) / self.bytes_per_token
        elif len(sums) > 2:
            metrics["validation/accuracy"] = (sums[2].sum() / count.sum()).item()
            if self.chance is not None:
                metrics["validation/chance"] = self.chance
        for first, last in position_ranges(len(count)):
            if part := count[first:last].sum().item():
                metrics[f"validation/nats_at/{first}-{last - 1}"] = nats[first:last].sum().item() / part
                if "validation/accuracy" in metrics:
                    metrics[f"validation/accuracy_at/{first}-{last - 1}"] = sums[2, first:last].sum().item() / part
        if found:
            datamodule = self.trainer.datamodule
            named = dict(zip(datamodule.test_points(), found.values(), strict=True))
            metrics |= points.metrics(named, datamodule.task.by_position)
        self.log_dict(metrics, rank_zero_only=True)


def _sum_over_ranks(x: Tensor) -> Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def position_ranges(seq_len: int) -> list[tuple[int, int]]:
    """Positions in ranges that double: [0, 16), [16, 32), [32, 64), ..."""
    edges = [0]
    while (edges[-1] or 8) * 2 < seq_len:
        edges.append((edges[-1] or 8) * 2)
    return list(zip(edges, [*edges[1:], seq_len], strict=True))
