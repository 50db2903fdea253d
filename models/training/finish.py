"""The end of a run: the last validation, and the model as a folder that from_pretrained loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L

from data.module import DataModule
from models.training.callbacks import Throughput
from models.training.logger import Tolerant
from models.training.module import Training
from models.training.run import Run, describe
from models.training.summary import say
from models.training.watchdog import Watchdog


@contextmanager
def ending(trainer: L.Trainer, run: Run) -> Iterator[None]:
    """However the run ends within it, it leaves nothing to another run of this process: loggers are closed, nobody
    watches over it any more, its directory is free."""
    failed = True
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
    weights = trainer.strategy.lightning_module_state_dict()  # every rank takes part where it is sharded
    if not trainer.is_global_zero:
        return
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    module.model.save_pretrained(run.folder / "model", state_dict=weights)
    if datamodule.task.tokenizer is not None:
        datamodule.task.tokenizer.save(run.folder / "model")
    found = trainer.callback_metrics
    run.finish(result := {name: float(value) for name, value in found.items() if name.startswith("validation/")})
    speed = [callback.summary() for callback in trainer.callbacks if isinstance(callback, Throughput)]
    say(f"finished  {'; '.join([describe(result), *speed])}")
    say(f"          {run.folder}: metrics.csv, loss.png, model/")
