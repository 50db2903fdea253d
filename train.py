"""Train a language model whose token mixers are test-time regressors.

    python train.py model=gated_delta                    # any machine, no downloads
    python train.py model=softmax size=170m data=fineweb_edu strategy=ddp logger=wandb
    python train.py --help                               # the groups and what is in them

The same command after an interruption goes on from the last checkpoint. conf/train.yaml has the settings; README.md
explains them.
"""

from __future__ import annotations

import logging
import sys
import warnings

import hydra
import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from conf import schema
from conf.build import build
from conf.checks import mistakes
from data.batch import batch_arithmetic, every
from data.module import DataModule, misfits
from models.language_model import LanguageModel, LanguageModelConfig
from models.training.callbacks import Checkpoint, Throughput
from models.training.module import Training
from models.training.run import Run, describe
from models.training.summary import summary

schema.register()
for name in ("lightning.pytorch", "lightning.fabric"):  # what matters of the machine is in our own summary
    logging.getLogger(name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # inside lightning 2.6, about torch
warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged has been summed over the ranks
warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # num_workers is a setting


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        trainer, module, datamodule, run, overview = assemble(cfg)
    except ValueError as error:  # a mistake in the settings: what it is, without a traceback
        sys.exit(f"error: {error}")
    if run.result is not None:
        say(f"{run.folder} is finished: {describe(run.result)}")
        say("For another run choose another name=, or overwrite=true to delete this one.")
        return
    say(f"run       {run.folder}")
    say("\n".join(f"data      {line}" for line in datamodule.task.describe()))
    say(f"batch     {datamodule.batch}")
    say(overview)
    if run.checkpoint is not None:
        say(f"going on from {run.checkpoint}")
    for logger in trainer.loggers:
        logger.log_hyperparams(run.config)
    trainer.fit(module, datamodule, ckpt_path=run.checkpoint)
    if trainer.interrupted or trainer.global_step < module.num_steps:
        sys.exit(f"stopped after {trainer.global_step} of {module.num_steps} steps; the same command goes on")
    finish(trainer, module, datamodule, run)


def assemble(cfg: DictConfig) -> tuple[L.Trainer, Training, DataModule, Run, str]:
    """Everything that a run needs, checked and built, but not trained. Raises ValueError for the user's mistakes."""
    if found := mistakes(cfg):
        raise ValueError("\n       ".join(found))
    plain = OmegaConf.to_container(cfg, resolve=True)
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
    parts = {"optimizer": build(cfg.optimizer), "schedule": build(cfg.schedule), "compile_blocks": cfg.compile}
    counts = {"targets_per_token": task.targets_per_token, "bytes_per_token": task.bytes_per_token}
    module = Training(model, num_steps=batch.num_steps, clip_norm=cfg.clip_norm, **parts, **counts)
    checkpoints = Checkpoint(run.folder / "checkpoints", checkpoint_every, validate_every)
    trainer = build(
        cfg.trainer,
        default_root_dir=str(run.folder),
        logger=[build(node) for node in cfg.logger.values()],
        callbacks=[*(build(node) for node in cfg.callbacks.values()), checkpoints],
        max_steps=batch.num_steps,
        max_epochs=-1,
        accumulate_grad_batches=batch.accumulation,
        val_check_interval=validate_every * batch.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,  # models.training.callbacks.Checkpoint
        log_every_n_steps=min(cfg.log_every, batch.num_steps),
    )
    if trainer.world_size != world_size:
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} means {world_size} processes, and {trainer.world_size} were started"
        )
    dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
    overview = summary(model, cfg.seq_len, trainer.strategy.root_device, dtype)
    run.enter(trainer.is_global_zero)
    return trainer, module, datamodule, run, overview


def finish(trainer: L.Trainer, module: Training, datamodule: DataModule, run: Run) -> None:
    """The last validation, and the model as a folder that from_pretrained loads."""
    trainer.validate(module, datamodule, verbose=False)
    weights = trainer.strategy.lightning_module_state_dict()  # every rank takes part where it is sharded
    if not trainer.is_global_zero:
        return
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    module.model.save_pretrained(run.folder / "model", state_dict=weights)
    if datamodule.task.tokenizer is not None:
        datamodule.task.tokenizer.save(run.folder / "model")
    found = trainer.callback_metrics
    run.finish({name: float(value) for name, value in found.items() if name.startswith("validation/")})
    speed = [callback.summary() for callback in trainer.callbacks if isinstance(callback, Throughput)]
    say(f"finished  {'; '.join([describe(run.result), *speed])}")
    say(f"          {run.folder}: metrics.csv, loss.png, model/")


@rank_zero_only
def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
