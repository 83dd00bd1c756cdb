"""Memory that was let go goes back to the system, and what no run needs is never in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
FREED = """
import psutil, torch
from qft.libraries import freed_at_once
held = torch.ones(1)
def freed():
    most = psutil.Process().memory_info().rss
    pieces, between = [torch.ones(250_000) for _ in range(200)], torch.ones(20_000)
    del pieces
    return between, psutil.Process().memory_info().rss - most
with freed_at_once():
    inside = [freed() for _ in range(2)]
outside = [freed() for _ in range(2)]
print(max(more for _, more in inside), max(more for _, more in outside))
"""
LOADED = """
import json, sys, torch
from pathlib import Path
from qft.base_model import load
from qft.training.lora import Lora
own = torch.compile
model = Lora(4, 8, 0).attach(load(Path(sys.argv[1]), base="nf4", double_quant=True, compute_dtype="float32"))
import transformers.utils
assert torch.compile is own and transformers.utils.is_scipy_available()
maps = Path("/proc/self/maps")
print(json.dumps({"modules": sorted(sys.modules), "files": maps.read_text() if maps.exists() else ""}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own habit")
def test_freed_memory_goes_back_though_later_pieces_are_still_held() -> None:
    # In a process of its own: what other tests freed before would be counted, or used again.
    done = subprocess.run([sys.executable, "-c", PIECES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100e6


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own habit")
def test_what_is_freed_in_a_block_is_the_systems_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    inside, outside = map(int, done.stdout.split())
    assert inside < 10e6  # 200 MB were asked for and freed, beneath a piece that is held
    assert outside > 100e6


def test_a_quantized_base_brings_no_library_that_nothing_asks_for_and_keeps_no_page_of_its_file(
    tiny_model: Path,
) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, tiny_model], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {"transformers.modeling_utils", "bitsandbytes", "peft"} <= set(found["modules"])
    assert not {"sklearn", "scipy", "pandas", "pyarrow", "torch._inductor.lowering"} & set(found["modules"])
    assert "model.safetensors" not in found["files"]


def test_libraries_tell_their_makers_nothing_unless_the_environment_says_so() -> None:
    names = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY")
    code = f"import os, sys, qft; assert 'onnxruntime' not in sys.modules; print([os.environ[n] for n in {names}])"
    plain = {name: value for name, value in os.environ.items() if name not in names}
    for given, expected in (({}, "['1', '1', '1']"), ({"ORT_DISABLE_TELEMETRY": "0"}, "['0', '1', '1']")):
        said = subprocess.run(
            [sys.executable, "-c", code], env=plain | given, capture_output=True, text=True, check=True
        )
        assert said.stdout.strip() == expected
