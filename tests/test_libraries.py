"""Memory that was let go goes back to the system."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from qft.libraries import return_memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own habit")
def test_freed_memory_goes_back_though_later_pieces_are_still_held() -> None:
    held = []
    for _ in range(2):  # glibc takes pieces of a size from the system one by one until it has seen one freed
        pieces = [torch.ones(250_000) for _ in range(200)]  # 1 MB each
        held.append(torch.ones(20_000))  # lies behind them
        del pieces
    before = psutil.Process().memory_info().rss
    return_memory()
    assert before - psutil.Process().memory_info().rss > 100e6
    assert float(held[0].sum()) == 20_000
