"""`qft doctor` on this installation, and on ones that are broken as real ones are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qft.cli.doctor import _tuned_in, for_the_card
from qft.device import Device
from qft.measure.trials import trials


def doctor(
    *shadowing: Path, cache: Path | None = None, words: str = "doctor --json"
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with folders whose modules stand before the installed ones."""
    path = os.pathsep.join([*map(str, shadowing), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path, **({"QFT_CACHE": str(cache)} if cache else {})}
    return subprocess.run(
        [sys.executable, "-m", "qft", *words.split()], capture_output=True, text=True, env=environment, check=False
    )


def test_what_is_tried_works_here() -> None:
    done = list(trials())
    assert [trial.problem for trial in done] == [""] * 4
    assert all(trial.seconds > 0 for trial in done)


def test_where_all_works_the_last_word_is_ready() -> None:
    done = doctor(words="doctor")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "ready"
    assert done.stdout.count("✓") == 4


def test_an_installation_that_cannot_export_is_not_called_ready(tmp_path: Path) -> None:
    (tmp_path / "optimum").mkdir()
    (tmp_path / "optimum/__init__.py").write_text("")  # as where optimum is there, and optimum-onnx was written over
    done = doctor(tmp_path, words="doctor")
    assert done.returncode == 1
    assert "✗" in next(line for line in done.stdout.splitlines() if "one export, by optimum" in line)
    assert done.stdout.count("✓") == 3
    told = done.stdout.partition("not ready:\n")[2]
    assert "No module named 'optimum.exporters'" in told
    assert "pip install --force-reinstall --no-deps optimum==" in told.splitlines()[-1]


def test_a_library_that_cannot_be_loaded_is_named_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('libbitsandbytes_cpu.so not found')\n")
    done = doctor(tmp_path, cache=tmp_path / "cache")
    said = json.loads(done.stdout)
    assert done.returncode == 1
    assert not said["ready"]
    (problem,) = [p for p in said["problems"] if "bitsandbytes" in p["where"]]
    assert "libbitsandbytes_cpu.so not found" in problem["what"]
    assert "pip install --force-reinstall --no-deps bitsandbytes==" in problem["hint"]
    assert sum(not trial["problem"] for trial in said["trials"]) == 3
    assert said["onnxruntime_for_the_card"] is None or said["card"]["kind"] == "cuda"


@pytest.mark.parametrize("emptied", [False, True])
def test_two_onnxruntimes_are_a_problem_whether_or_not_the_module_still_works(emptied: bool, tmp_path: Path) -> None:
    """pip lets both be installed; the later one's files replace the earlier one's, and removing one leaves an empty module."""
    about = tmp_path / "onnxruntime_gpu-1.23.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.23.2\n")
    if emptied:
        (tmp_path / "onnxruntime").mkdir()
        (tmp_path / "onnxruntime/__init__.py").write_text("")
    done = doctor(tmp_path)
    said = json.loads(done.stdout)
    assert done.returncode == 1
    assert set(said["onnxruntime_packages"]) == {"onnxruntime", "onnxruntime-gpu"}
    hints = " ".join(problem["hint"] for problem in said["problems"])
    assert "pip uninstall --yes onnxruntime onnxruntime-gpu" in hints
    assert any(trial["problem"] for trial in said["trials"]) == emptied


def test_a_card_is_named_with_what_tuning_takes_of_it() -> None:
    card = Device("cuda", "GTX 1650", (7, 5), 4_000_000_000, 3_500_000_000, "Linux")
    said = "GTX 1650 (cuda, compute capability 7.5), 3.5 of 4.0 GB free"
    assert _tuned_in(card) == f"{said}, tuned in float16, attention by torch's kernel efficient"


def test_a_card_beside_the_processors_onnxruntime_is_told_the_two_lines_to_type() -> None:
    card = Device("cuda", "NVIDIA GeForce RTX 4060 Laptop GPU", (8, 9), 8_000_000_000, 7_000_000_000, "Linux")
    plain = {"onnxruntime": "1.23.2"}
    assert for_the_card(card, plain) == (
        "python -m pip uninstall --yes onnxruntime\n  python -m pip install onnxruntime-gpu"
    )
    assert for_the_card(card, {"onnxruntime-gpu": "1.23.2"}) is None
    assert for_the_card(card, plain | {"onnxruntime-gpu": "1.23.2"}) is None  # two at once are a problem of their own
    assert for_the_card(replace(card, kind="mps", capability=None), plain) is None
    assert for_the_card(None, plain) is None
