"""Download, tokenise and cache a corpus ahead of training, on a machine without a GPU:

    python scripts/prepare_data.py data=fineweb_edu tokenizer=bpe

train.py does the same at its start where it is missing. Set TTR_CACHE to a folder that the training machines share.
num_workers=8 tokenises by eight processes. The same command after a kill goes on where it was. To hash all that is
there, and learn of a flipped bit:

    python scripts/prepare_data.py data=fineweb_edu tokenizer=bpe +verify=true

With TTR_STORE=s3://bucket/prepared (or another URL or folder) it puts there what it has made, and runs fetch it.

Sixteen machines prepare a part each, with part= from 0 to 15. Then the command without part= and parts= merges them:

    python scripts/prepare_data.py data=text_files data.corpus.path=pages part=3 parts=16
    python scripts/prepare_data.py data=text_files data.corpus.path=pages
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from omegaconf import DictConfig

from conf import schema, settings
from conf.command import one_sentence
from data.store import put
from models.build import build


@one_sentence
@hydra.main(config_path="../conf", config_name="train", version_base="1.3")
def prepare(cfg: DictConfig) -> None:
    settings.whole_numbers(cfg)
    try:
        task = build(cfg.data, tokenizer=build(cfg.tokenizer), seq_len=cfg.seq_len)
        if cfg.part is None and cfg.parts is None:
            task.prepare(cfg.num_workers, verify=cfg.get("verify", False))
            for folder in task.folders:
                put(folder)
            print(*task.describe(), sep="\n")
            return
        if cfg.part is None or cfg.parts is None:
            raise ValueError(f"part={cfg.part} and parts={cfg.parts} belong together; without both, parts are merged")
        for folder in task.prepare_part(cfg.part, cfg.parts, cfg.num_workers):
            print(f"part={cfg.part} of parts={cfg.parts} is prepared: {folder}")
    except ValueError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    schema.register(schema.Preparation)
    try:
        prepare()
    finally:
        schema.register()


if __name__ == "__main__":
    main()
