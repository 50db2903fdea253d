"""Baselines: layers that are no test-time regressors, for comparison with those that are.

    baseline.py    Baseline, what they share: states, documents, forms, counts
    mamba.py       Mamba: a selective state space, in each channel a few numbers that fade at rates of their own
    lstm.py        LSTM: a vector that gates write and erase, by products with itself
    long_conv.py   LongConv: a convolution as long as the sequence, the same for every text

None has keys and values: nothing is looked up by likeness, and no loss within the sequence is lowered. They are mixers
all the same, and obey the laws that do not speak of a regression.
"""

from models.mixers.baselines.baseline import Baseline
from models.mixers.baselines.long_conv import LongConv
from models.mixers.baselines.lstm import LSTM
from models.mixers.baselines.mamba import Mamba

__all__ = ["LSTM", "Baseline", "LongConv", "Mamba"]
