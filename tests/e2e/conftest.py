"""Typing commands, as a user does: a process of its own, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Type = Callable[..., "subprocess.CompletedProcess[str]"]


def type_in(folder: Path, line: str, *, timeout: float = 600, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `qft …` with the words of `line`."""
    words = line.split(" ")
    assert words[0] == "qft"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "qft", *words[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        input=stdin,
        check=False,
    )


def as_json(done: subprocess.CompletedProcess[str]) -> dict:
    """What a command that was typed with --json printed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def typed() -> Type:
    """`typed(folder, "qft run recipe.yaml")`."""
    return type_in


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, reviews: list[dict[str, str]]) -> Path:
    """A folder in which `qft tune recipe.yaml` and `qft export --onnx` were typed, literally."""
    from tests.conftest import RECIPE

    folder = tmp_path_factory.mktemp("job")
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_model))
    for line in ("qft tune recipe.yaml", "qft export --onnx"):
        done = type_in(folder, line)
        assert done.returncode == 0, done.stderr
    return folder
