"""What is compiled of a first step, counted without a GPU."""

from __future__ import annotations

import pytest

from models.kernels import backend
from models.regression.deep import memory
from scripts import graphs


@pytest.mark.slow
def test_a_deep_memory_is_compiled_once_for_all_layers_and_chunks(capsys):
    graphs.count("yaad", 320)
    first, second = capsys.readouterr().out.split("yaad, second step")
    assert first.count("steps of forms.py") == 1 and "yaad, first step: 6 graphs" in first
    assert second.startswith(": 0 graphs") and memory.compiles is backend.compiles
