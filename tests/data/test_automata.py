"""RegBench's sequences beside its definition, symbol by symbol."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data import automata
from data.automata import EDGES, FILLER, LONGEST, SEPARATOR, RegBench
from data.text import IGNORE
from models.language_model import LanguageModel, LanguageModelConfig
from models.training.module import Training
from tests.test_config import composed

N = 200


@pytest.fixture(scope="module")
def made() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return RegBench(960).make("train", np.arange(N))


def words(tokens: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Of one sequence. Of the longest of all, the last token is a label alone."""
    whole = tokens[tokens != FILLER].tolist()
    whole += [int(labels[-1])] if labels[-1] != IGNORE else []
    found: list[list[int]] = [[]]
    for token in whole:
        found = [*found, []] if token == SEPARATOR else [*found[:-1], [*found[-1], token]]
    return found


def test_every_word_is_a_walk_of_the_automaton_and_what_is_right_are_its_edges(made):
    """As a reader of the paper would check it: by a dictionary for each automaton, word by word."""
    most, sizes = automata.STATES[1], (2, 18, 12, 12 * 18, 12 * 12, 1, 19, 19 * 49)
    u = np.split(automata.uniform(0, "train", np.arange(N), sum(sizes)), np.cumsum(sizes)[:-1], axis=1)
    symbols, targets, edges = automata.automata(*u[:5])
    for i in range(20):
        edges_of = [
            dict(zip(symbols[i, s, : edges[i, s]], targets[i, s, : edges[i, s]], strict=True)) for s in range(most)
        ]
        tokens, labels, right = (x[i] for x in made)
        at, found = 0, words(tokens, labels)
        for number, word in enumerate(found):
            state = 0
            for place, symbol in enumerate(word):
                allowed = edges_of[state]
                assert len(allowed) == edges[i, state] and state not in allowed.values(), "different ends, no loop"
                if number or place:  # the first symbol of all is not asked for
                    assert labels[at] == symbol and right[at] == sum(1 << int(s) for s in allowed)
                    at += 1
                state = allowed[symbol]
            if number < len(found) - 1:
                assert labels[at] == IGNORE and right[at] == 0, "where a separator comes next nothing is asked"
                at += 1
        assert (labels[at:] == IGNORE).all() and (tokens[at + 1 :] == FILLER).all() and len(found) >= 10


def test_sizes_are_the_published_ones(made):
    """Draw by draw uniform: 10 to 19 words of 1 to 49 symbols; 1 to 3 edges; at least 4 symbols."""
    each = [words(tokens, labels) for tokens, labels in zip(made[0], made[1], strict=True)]
    counts, lengths = [len(of) for of in each], [len(word) for of in each for word in of]
    assert (min(counts), max(counts)) == (10, 19) and (min(lengths), max(lengths)) == (1, 49)
    assert np.mean(lengths) == pytest.approx(25, abs=0.8) and made[0].shape == (N, LONGEST)
    ways = [int(x).bit_count() for x in made[2][made[2] > 0]]
    assert (min(ways), max(ways)) == EDGES and np.mean(ways) == pytest.approx(2, abs=0.1)
    asked = (made[1] != IGNORE).sum() / N
    assert RegBench(960).targets_per_token * 960 == pytest.approx(asked, rel=0.03)
    with pytest.raises(
        ValueError, match="seq_len=512 is shorter than the longest sequence of RegBench; 948 are needed"
    ):
        RegBench(512)


def test_a_prediction_is_right_if_the_automaton_may_go_on_so():
    """Not only the symbol that came: berlino/seq_icl, eval.py. One that always says `b` is right where b may come."""
    cfg = composed(
        "model=linear", "size=tiny", "data=regbench", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=1"
    )
    model = LanguageModel(LanguageModelConfig(vocab_size=20, **OmegaConf.to_container(cfg.model, resolve=True)))
    module = Training(
        model, optimizer=lambda m: None, schedule=lambda num_steps: lambda step: 1.0, num_steps=1, clip_norm=1
    )
    batch = RegBench(960).validation_samples().__getitems__([0, 1])
    module.model.score = lambda ids, labels, segments: (torch.zeros(ids.shape), torch.ones_like(ids))
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    _, count, right = module._validation[0, 0].sum(1).tolist()
    assert count == (batch["labels"] != IGNORE).sum() and right == (batch["right"] >> 1 & 1).sum()
    assert right > (batch["labels"] == 1).sum() > 0
    found: dict[str, float] = {}
    module._trainer = SimpleNamespace(global_step=1, datamodule=SimpleNamespace(batch=SimpleNamespace(tokens=1)))
    module.log_dict = lambda metrics, **_: found.update(metrics)
    module.on_validation_epoch_end()
    asked = (batch["labels"] != IGNORE)[:, 16:32]
    assert found["validation/accuracy"] == right / count
    assert found["validation/accuracy_at/16-31"] == (batch["right"][:, 16:32][asked] >> 1 & 1).float().mean()
