"""What a GPU does in a step."""

from __future__ import annotations

import pytest

from models.training.traced import Kernel, covered, summed


def test_time_that_kernels_cover():
    kernels = [Kernel("a", 4, 6), Kernel("b", 0, 3), Kernel("c", 1, 2), Kernel("d", 2, 4)]
    assert covered(kernels) == 6 and covered([]) == 0


def test_computing_sending_and_neither():
    kernels = [Kernel("gemm", 0, 3), Kernel("ncclDevKernel_AllGather", 2, 5), Kernel("gemm", 6, 7)]
    found = summed(kernels)
    assert found.pop("longest") == [["gemm", 2, 4], ["ncclDevKernel_AllGather", 1, 3]]
    assert found == {"span": 7, "computing": 4, "sending": 3, "sending_alone": 2, "idle": pytest.approx(1)}
    assert summed([]) == {}
