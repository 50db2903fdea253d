"""One job: everything that a run needs is built from its config, trained, and closed."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf

from conf import schema, settings
from conf.checks import dtype, mistakes
from conf.folders import refuse
from data.batch import Batch, batch_arithmetic, every
from data.module import DataModule, OtherDataError, misfits
from models.build import build
from models.continuous import Continuous
from models.language_model import LanguageModel, LanguageModelConfig
from models.reconstruction import Reconstruction
from models.training import fitting, weights
from models.training.branch import branch
from models.training.captured import meet_in_blocks
from models.training.checkpoint import Checkpoint, newest_whole, step_of
from models.training.finish import ending, finish
from models.training.guards import Guard
from models.training.keep import steps_to_keep
from models.training.logger import Tolerant, logged
from models.training.loggers.about import about
from models.training.memory import why
from models.training.mirror import Mirror, newest
from models.training.module import Training
from models.training.preemption import Preemption
from models.training.run import Run, describe
from models.training.schedule import end_of_plateau
from models.training.summary import quiet, say, summary
from models.training.sweep import Result
from models.training.watchdog import Watchdog


def train(cfg: DictConfig) -> Result:
    """The result of the run, which may be finished already. Ends the process where its user has to do something."""
    quiet()
    with Preemption() as preemption:
        try:
            preemption.overwrites = cfg.overwrite
            settings.whole_numbers(cfg)
            if cfg.micro_batch == fitting.AUTO:
                checked(cfg)  # what is wrong is told before anything is tried
                fitting.settle(cfg, kind_of)
            trainer, module, datamodule, run, overview = assemble(cfg, preemption)
            # what overwrite=true deletes may still be there for other processes than the first
            checkpoint, torn = (None, []) if cfg.overwrite else newest_whole(run.checkpoints, run.branch)
            result = None if cfg.overwrite else run.result
            begin = not (checkpoint or result)
            begun = weights.load(module.model, cfg.init_from, datamodule.task.tokenizer) if begin else ""
        except ValueError as error:  # a mistake in the settings: what it is, without a traceback
            refuse(cfg.run_dir, [str(error)])
        if result is not None:
            if run.mirror and trainer.is_global_zero:  # the last copy may have been broken off
                run.mirror.begin(newest(run.folder))
                run.mirror.wait()
            say(f"{run.folder} is finished: {describe(result)}")
            say("For another run choose another name=, or overwrite=true to delete this one.")
            return result
        say(f"run       {run.folder}")
        say("\n".join(f"data      {line}" for line in datamodule.describe()))
        say(f"batch     {datamodule.batch}\n{overview}")
        say("\n".join(filter(None, [*torn, f"going on from {checkpoint}" if checkpoint else begun])))
        with ending(trainer, run):
            seen = logged(run.folder)
            for logger in trainer.loggers:
                if isinstance(logger, Tolerant):
                    logger.resume(step_of(checkpoint) if checkpoint else 0, seen)
                logger.log_hyperparams(run.config | about(module.model, datamodule.batch.seq_len, run.origin))
            try:
                trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
                if (step := trainer.global_step) < module.num_steps:
                    sys.exit(f"stopped after {step} of {module.num_steps} steps; the same command goes on")
                finish(trainer, module, datamodule, run)
                if run.mirror and trainer.is_global_zero:
                    run.mirror.begin(trainer.global_step)
                    run.mirror.wait()
            except (RuntimeError, MemoryError, OtherDataError) as error:
                sys.exit(f"error: {why(error, datamodule.batch, cfg.recompute)}")
        return run.result


def kind_of(task: Any) -> type[LanguageModel]:
    """The model that a task is for: few have one of their own."""
    if getattr(task, "reconstructs", False):
        return Reconstruction
    return Continuous if getattr(task, "continuous", False) else LanguageModel


def checked(cfg: DictConfig) -> tuple[dict[str, Any], Batch]:
    """The settings as plain containers, and what they make of a batch. Raises ValueError with all that is wrong."""
    settings.whole_numbers(cfg)
    if found := mistakes(cfg):
        raise ValueError("\n       ".join(found))
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    world_size = schema.world_size(cfg.trainer.devices, cfg.trainer.num_nodes)
    sizes = cfg.batch_tokens, cfg.seq_len, schema.at_first(cfg.micro_batch), world_size
    return plain, batch_arithmetic(*sizes, cfg.tokens, cfg.context_parallel)


def assemble(cfg: DictConfig, preemption: Preemption) -> tuple[L.Trainer, Training, DataModule, Run, str]:
    """Everything that a run needs, checked and built, but not trained. Raises ValueError for the user's mistakes."""
    plain, batch = checked(cfg)
    validate_every = every(cfg.validate_every, batch.num_steps, "validate_every")
    checkpoint_every = every(cfg.checkpoint_every, batch.num_steps, "checkpoint_every")
    kept = steps_to_keep(plain["keep"], batch.num_steps)
    run = Run(cfg.run_dir, plain)
    run.mirror = Mirror(cfg.mirror, run.folder) if cfg.mirror else None
    if run.mirror and not cfg.overwrite:
        say(run.mirror.fetch(plain))
    if cfg.init_from and not run.checkpoints.exists():
        weights.find(cfg.init_from)

    L.seed_everything(cfg.seed, verbose=False)
    task = build(cfg.data, tokenizer=build(cfg.tokenizer), seq_len=cfg.seq_len)
    task.prepare(cfg.num_workers)
    if found := misfits(task, batch):
        raise ValueError("\n       ".join(found))
    datamodule = DataModule(task, batch, cfg.validation_tokens, cfg.seed, cfg.num_workers, cfg.overfit)

    special: dict[str, Any] = {} if task.tokenizer is None else task.tokenizer.special_ids
    model = kind_of(task)(LanguageModelConfig(vocab_size=task.vocab_size, **special, **plain["model"]))
    parts: dict[str, Any] = {
        "optimizer": build(cfg.optimizer),
        "schedule": build(cfg.schedule),
        "compile_blocks": cfg.compile,
        "recompute": cfg.recompute,
        "cuda_graph": cfg.cuda_graph,
        "context_parallel": cfg.context_parallel,
    }
    counts = {name: getattr(task, name) for name in ("targets_per_token", "bytes_per_token", "chance")}
    counts["sources"] = getattr(task, "sources", ())  # only a mixture has them
    guards: dict[str, Any] = {"guard": Guard(cfg.guard.max_skipped, cfg.guard.spike_score), "preemption": preemption}
    module = Training(model, num_steps=batch.num_steps, clip_norm=cfg.clip_norm, **parts, **counts, **guards)
    plateau = end_of_plateau(module.schedule, batch.num_steps)
    which = (cfg.keep.newest, kept, plateau, run.mirror)
    checkpoints = Checkpoint(run.checkpoints, checkpoint_every, validate_every, preemption, *which)
    last = [preemption, checkpoints, Watchdog(cfg.guard.timeout)]
    trainer = build(
        cfg.trainer,
        default_root_dir=str(run.folder),
        logger=[Tolerant(build(node)) for node in cfg.logger.values()],
        callbacks=[*(build(node) for node in cfg.callbacks.values() if node is not None), *last],
        max_steps=batch.num_steps,
        max_epochs=-1,
        accumulate_grad_batches=batch.accumulation,
        val_check_interval=validate_every * batch.accumulation,
        check_val_every_n_epoch=None,
        enable_checkpointing=False,  # models.training.checkpoint.Checkpoint
        log_every_n_steps=min(cfg.log_every, batch.num_steps),
    )
    if trainer.world_size != batch.world_size:
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} means {batch.world_size} process(es), and {trainer.world_size} "
            f"were started; trainer.devices={trainer.world_size // cfg.trainer.num_nodes} fits these"
        )
    datamodule.documents = meet_in_blocks(trainer.strategy, cfg.context_parallel)
    overview = summary(model, cfg.seq_len, trainer.strategy.root_device, dtype(trainer.precision))
    run.enter(trainer.is_global_zero, branch)
    return trainer, module, datamodule, run, overview
