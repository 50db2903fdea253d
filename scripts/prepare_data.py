"""Download, tokenise and cache a corpus ahead of training, on a machine without a GPU:

    python scripts/prepare_data.py data=fineweb_edu tokenizer=bpe

train.py does the same at its start where it is missing. Set TTR_CACHE to a folder that the training machines share.
num_workers=8 tokenises by eight processes. The same command after a kill goes on where it was. To hash all that is
there, and learn of a flipped bit:

    python scripts/prepare_data.py data=fineweb_edu tokenizer=bpe +verify=true
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from omegaconf import DictConfig

from conf import schema, settings
from conf.command import one_sentence
from models.build import build

schema.register()


@one_sentence
@hydra.main(config_path="../conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    settings.whole_numbers(cfg)
    try:
        task = build(cfg.data, tokenizer=build(cfg.tokenizer), seq_len=cfg.seq_len)
        task.prepare(cfg.num_workers, verify=cfg.get("verify", False))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(*task.describe(), sep="\n")


if __name__ == "__main__":
    main()
