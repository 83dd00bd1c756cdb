"""Memory that was let go goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PIECES = """
import psutil, torch
from qft.libraries import return_memory
held = []
for _ in range(2):  # glibc takes pieces of a size from the system one by one until it has seen one freed
    pieces = [torch.ones(250_000) for _ in range(200)]  # 1 MB each
    held.append(torch.ones(20_000))  # lies behind them
    del pieces
before = psutil.Process().memory_info().rss
return_memory()
assert float(held[0].sum()) == 20_000
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own habit")
def test_freed_memory_goes_back_though_later_pieces_are_still_held() -> None:
    # In a process of its own: what other tests freed before would be counted, or used again.
    done = subprocess.run([sys.executable, "-c", PIECES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100e6
