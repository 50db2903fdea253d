"""The mean of checkpoints is a mean, and a model that all else takes.

Means of others were taken in the precision of the weights: https://github.com/OpenNMT/OpenNMT-py/pull/1294,
https://github.com/OpenNMT/OpenNMT-tf/pull/173. Of which checkpoints: https://github.com/NVIDIA-NeMo/Skills/pull/110.
"""

from __future__ import annotations

import json

import pytest
import torch

from data.tokenizer import Bytes
from models.language_model import LanguageModel
from models.training import weights
from models.training.checkpoint import WholeFiles
from scripts.average import main
from scripts.evaluate import arguments, default_name
from tests.evaluating.conftest import finished

STEPS = (3, 5, 8, 13)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """With a checkpoint of other weights at each step, the first of which are large: float32 would lose digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTR_CACHE", str(cache))
        folder = finished(tmp_path_factory.mktemp("averaged") / "run", "data=python_source", "tokens=1024")
    names = LanguageModel.from_pretrained(folder / "model").state_dict()
    for step in STEPS:
        torch.manual_seed(step)
        found = {f"model.{name}": torch.randn_like(x) * (1e6 if step == 3 else 1) for name, x in names.items()}
        found["model.head.weight"] = found["model.embedding.weight"]  # tied
        WholeFiles().save_checkpoint({"state_dict": found}, folder / "checkpoints" / f"step-{step:09d}.ckpt")
    return folder


def by_hand(run, steps, shares) -> dict[str, torch.Tensor]:
    files = [weights.read(run / "checkpoints" / f"step-{step:09d}.ckpt") for step in steps]
    return {
        name: sum(s * file[name].double() for s, file in zip(shares, files, strict=True)) / sum(shares)
        for name in files[0]
    }


@pytest.mark.parametrize(
    ("words", "name", "steps", "shares"),
    [
        ("--last 3", "last-3", STEPS[1:], (1, 1, 1)),
        ("--steps 13 3 5", "3-5-13", (3, 5, 13), (1, 1, 1)),
        ("--last 4 --decay 0.5", "last-4-decay-0.5", STEPS, (0.125, 0.25, 0.5, 1)),
    ],
)
def test_it_is_the_mean_of_hand(words, name, steps, shares, run, capsys):
    main([str(run), *words.split()])
    assert f"model-{name}: of {len(steps)} checkpoints, step {steps[0]}" in capsys.readouterr().out
    found = LanguageModel.from_pretrained(run / f"model-{name}").state_dict()
    for key, value in by_hand(run, steps, shares).items():
        assert torch.equal(found[key], value.float()), key
    assert json.loads((run / f"result-{name}.json").read_text())["averaged"] == list(steps)
    trained = weights.open_trained(run / f"model-{name}")
    assert trained.step == 13 and trained.run == run and trained.model.config.eos_token_id == Bytes.eos
    assert trained.tokenizer().vocab_size == 257
    evaluated = default_name(trained, arguments([str(trained.path)]), str(trained.path))
    assert evaluated == f"validation-{name}"  # beside that of the checkpoint of the same step
    assert weights.load(trained.model, str(trained.path), Bytes()).endswith(f"model-{name}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--last 1", "--last 1 must be from 2 to 4: .* has the checkpoints 3, 5, 8, 13"),
        ("--last 9", "--last 9 must be from 2"),
        ("--steps 3 4", "--steps 4 is no checkpoint of .*; there are 3, 5, 8, 13"),
        ("--steps 3", "--steps 3 is one checkpoint; a mean needs two"),
    ],
)
def test_what_has_no_mean_is_a_sentence(words, says, run):
    with pytest.raises(SystemExit, match=f"^error: {says}"):
        main([str(run), *words.split()])


def test_neither_a_torn_checkpoint_is_taken_nor_a_model_replaced(run, tmp_path):
    with pytest.raises(SystemExit, match=r"model-a is there already"):
        for _ in range(2):
            main([str(run), "--last", "2", "--name", "a"])
    torn = run / "checkpoints" / "step-000000021.ckpt"
    torn.write_bytes(b"half")
    try:
        with pytest.raises(SystemExit, match=r"step-000000021\.ckpt is torn: its checksum is missing"):
            main([str(run), "--last", "2", "--name", "b"])
    finally:
        torn.unlink()
