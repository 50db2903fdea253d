"""The end of a run: the last validation, and the model as a folder that from_pretrained loads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L

from data.module import DataModule
from models.training import origin
from models.training.logger import Tolerant
from models.training.module import Training
from models.training.parallel import Sharded
from models.training.run import Run, describe
from models.training.speed import Throughput
from models.training.summary import say
from models.training.watchdog import Watchdog


@contextmanager
def ending(trainer: L.Trainer, run: Run) -> Iterator[None]:
    """However the run ends within it, it leaves nothing to another run of this process: loggers are closed, nobody
    watches over it any more, its directory is free."""
    failed = True
    run.origin = origin.origin(trainer.strategy.root_device, trainer.world_size)
    say(f"with      {origin.describe(run.origin)}")
    try:
        yield
        failed = False
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, Tolerant):
                logger.close(failed)
        for callback in trainer.callbacks:
            if isinstance(callback, Watchdog):
                callback.stop()
        run.leave()


def finish(trainer: L.Trainer, module: Training, datamodule: DataModule, run: Run) -> None:
    """Every rank takes part. A run that is killed in here does all of it again."""
    trainer.validate(module, datamodule, verbose=False)
    strategy = trainer.strategy
    weights = strategy.whole_state_dict() if isinstance(strategy, Sharded) else strategy.lightning_module_state_dict()
    if not trainer.is_global_zero:
        return
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    module.model.save_pretrained(run.folder / "model", state_dict=weights)
    if datamodule.task.tokenizer is not None:
        datamodule.task.tokenizer.save(run.folder / "model")
    speeds = [callback for callback in trainer.callbacks if isinstance(callback, Throughput)]
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("validation/")}
    run.finish(
        found
        | run.origin
        | {name.replace("progress/", ""): int(value) for name, value in module.progress().items()}
        | {
            "parameters": sum(p.numel() for p in module.model.parameters()),
            "state_size": module.model.state_size(datamodule.batch.seq_len),  # numbers a sequence, at its end
            "tokens_per_second": speeds[0].tokens_per_second if speeds else None,
            "seconds": round(time.time() - module.began, 1),  # since this process began to train, at from_step
            "from_step": module.first_step,
        }
    )
    say(f"finished  {'; '.join([describe(found), *(callback.summary(module) for callback in speeds)])}")
    made = [name for name in ("metrics.csv", "loss.png", "model/") if (run.folder / name).exists()]
    say(f"          {run.folder}: {', '.join(made)}")
