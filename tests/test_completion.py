"""What the Tab key offers, as bash asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def offered(folder: Path, line: str) -> list[str]:
    words = line.split(" ")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_QFT_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "import sys; sys.argv[0] = 'qft'; from qft.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder, check=True
    )
    return [answer.partition(",")[2] for answer in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qft mer", ["merge"]),
        ("qft re", ["report", "recipes"]),
        ("qft run recipes/sar", ["recipes/sarcasm.yaml"]),
        ("qft plan m", ["mine.yaml"]),
        ("qft recipes copy sar", ["sarcasm"]),
        ("qft models --ta", ["--task"]),
    ],
)
def test_commands_recipes_and_options_are_offered(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: m\n")
    assert offered(tmp_path, line) == expected
