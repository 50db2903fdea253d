"""Train a language model whose token mixers are test-time regressors.

    python train.py model=gated_delta                    # any machine, no downloads
    python train.py model=softmax size=170m data=fineweb_edu strategy=ddp logger=wandb
    python train.py -m model=softmax,gated_delta seed=1,2   # a sweep
    python train.py size=1300m dry_run=true              # what it would take, and no run
    python train.py --help                               # the groups and what is in them

The same command goes on after an interruption; exit code 75 asks for it. conf/train.yaml has the settings.

Here stands the way in: words -> a config without mistakes -> models/training/job.py, which builds and trains.
"""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf import schema, settings
from conf.command import one_sentence
from conf.folders import refuse
from conf.known import hidden
from models.training.sweep import Result, Sweep
from scripts import report

schema.register()
sweep = Sweep(report.of_sweep)


@sweep.reported
@one_sentence
@hydra.main(config_path="conf", config_name="train", version_base="1.3")
@sweep.job
def main(cfg: DictConfig) -> Result:
    if found := [*hidden(), *settings.mistakes(OmegaConf.to_container(cfg))]:
        refuse(HydraConfig.get().runtime.output_dir, found)
    if cfg.dry_run:
        from scripts.planning.dry_run import dry_run

        return dry_run(cfg)
    from models.training.job import train  # with torch, Lightning and transformers, which take six seconds

    return train(cfg)


if __name__ == "__main__":
    main()
