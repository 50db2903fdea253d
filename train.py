"""Train a language model whose token mixers are test-time regressors.

    python train.py model=gated_delta                    # any machine, no downloads
    python train.py model=softmax size=170m data=fineweb_edu strategy=ddp logger=wandb
    python train.py --help                               # the groups and what is in them

The same command goes on after an interruption; exit code 75 asks for it. conf/train.yaml has the settings.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from conf import schema, settings
from conf.command import one_sentence
from conf.known import hidden

if TYPE_CHECKING:  # they take six seconds to import: where they are used, behind the first checks
    import lightning as L

    from data.module import DataModule
    from models.training.module import Training
    from models.training.preemption import Preemption
    from models.training.run import Run

schema.register()


@one_sentence
@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    if found := [*hidden(), *settings.mistakes(OmegaConf.to_container(cfg))]:
        sys.exit("error: " + "\n       ".join(found))
    from models.training.checkpoint import newest_whole, step_of
    from models.training.finish import finish
    from models.training.logger import Tolerant
    from models.training.memory import why
    from models.training.preemption import Preemption
    from models.training.run import describe
    from models.training.summary import quiet, say

    quiet()
    with Preemption() as preemption:
        try:
            trainer, module, datamodule, run, overview = assemble(cfg, preemption)
            checkpoint, torn = newest_whole(run.checkpoints)
        except ValueError as error:  # a mistake in the settings: what it is, without a traceback
            sys.exit(f"error: {error}")
        if run.result is not None:
            say(f"{run.folder} is finished: {describe(run.result)}")
            return say("For another run choose another name=, or overwrite=true to delete this one.")
        say(f"run       {run.folder}")
        say("\n".join(f"data      {line}" for line in datamodule.task.describe()))
        say(f"batch     {datamodule.batch}\n{overview}")
        say("\n".join([*torn, *([f"going on from {checkpoint}"] if checkpoint else [])]))
        for logger in trainer.loggers:
            if isinstance(logger, Tolerant):
                logger.resume(step_of(checkpoint) if checkpoint else 0)
            logger.log_hyperparams(run.config)
        try:
            trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
            if trainer.global_step < module.num_steps:
                sys.exit(f"stopped after {trainer.global_step} of {module.num_steps} steps; the same command goes on")
            finish(trainer, module, datamodule, run)
        except (RuntimeError, MemoryError) as error:
            sys.exit(f"error: {why(error, datamodule.batch)}")


def assemble(cfg: DictConfig, preemption: Preemption) -> tuple[L.Trainer, Training, DataModule, Run, str]:
    """Everything that a run needs, checked and built, but not trained. Raises ValueError for the user's mistakes."""
    import lightning as L

    from conf.checks import dtype, mistakes
    from data.batch import batch_arithmetic, every
    from data.module import DataModule, misfits
    from models.build import build
    from models.language_model import LanguageModel, LanguageModelConfig
    from models.training.checkpoint import Checkpoint
    from models.training.guards import Guard
    from models.training.logger import Tolerant
    from models.training.module import Training
    from models.training.run import Run
    from models.training.summary import summary
    from models.training.watchdog import Watchdog

    settings.whole_numbers(cfg)
    if found := mistakes(cfg):
        raise ValueError("\n       ".join(found))
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    world_size = schema.world_size(cfg.trainer.devices, cfg.trainer.num_nodes)
    batch = batch_arithmetic(cfg.batch_tokens, cfg.seq_len, cfg.micro_batch, world_size, cfg.tokens)
    validate_every = every(cfg.validate_every, batch.num_steps, "validate_every")
    checkpoint_every = every(cfg.checkpoint_every, batch.num_steps, "checkpoint_every")
    run = Run(cfg.run_dir, plain)

    L.seed_everything(cfg.seed, verbose=False)
    task = build(cfg.data, tokenizer=build(cfg.tokenizer), seq_len=cfg.seq_len)
    task.prepare(cfg.num_workers)
    if found := misfits(task, batch, cfg.validation_tokens):
        raise ValueError("\n       ".join(found))
    datamodule = DataModule(task, batch, cfg.validation_tokens, cfg.seed, cfg.num_workers, cfg.overfit)

    model = LanguageModel(LanguageModelConfig(vocab_size=task.vocab_size, **plain["model"]))
    parts: dict[str, Any] = {"optimizer": build(cfg.optimizer), "schedule": build(cfg.schedule)}
    counts: dict[str, Any] = {"targets_per_token": task.targets_per_token, "bytes_per_token": task.bytes_per_token}
    parts |= {"guard": Guard(cfg.guard.max_skipped, cfg.guard.spike_score), "preemption": preemption}
    parts |= {"num_steps": batch.num_steps, "clip_norm": cfg.clip_norm, "compile_blocks": cfg.compile}
    module = Training(model, **parts, **counts)
    checkpoints = Checkpoint(run.checkpoints, checkpoint_every, validate_every, preemption)
    last = [preemption, checkpoints, Watchdog(cfg.guard.timeout)]
    trainer = build(
        cfg.trainer,
        default_root_dir=str(run.folder),
        logger=[Tolerant(build(node)) for node in cfg.logger.values()],
        callbacks=[*(build(node) for node in cfg.callbacks.values()), *last],
        max_steps=batch.num_steps,
        max_epochs=-1,
        accumulate_grad_batches=batch.accumulation,
        val_check_interval=validate_every * batch.accumulation,
        check_val_every_n_epoch=None,
        enable_checkpointing=False,  # models.training.checkpoint.Checkpoint
        log_every_n_steps=min(cfg.log_every, batch.num_steps),
    )
    if trainer.world_size != world_size:
        said = (
            f"trainer.devices={cfg.trainer.devices} means {world_size} processes, and {trainer.world_size} were started"
        )
        raise ValueError(said)
    overview = summary(model, cfg.seq_len, trainer.strategy.root_device, dtype(trainer.precision))
    run.enter(trainer.is_global_zero)
    return trainer, module, datamodule, run, overview


if __name__ == "__main__":
    main()
