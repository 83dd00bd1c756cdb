"""Letters in terminals and pipes: UTF-8 unless somebody says otherwise, and what cannot be shown ends nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROWS = "文本,标签\n" + "".join(f"房间{n}很好，很干净。,好\n房间{n}很差，很脏。,差\n" for n in range(40))
FEW_LETTERS = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # as of a Windows code page, but ASCII


def ask(folder: Path, *words: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    rest = {name: value for name, value in os.environ.items() if name not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    return subprocess.run(
        [sys.executable, "-m", "qft", *words],
        cwd=folder,
        env={**rest, **environment},
        input=stdin,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "cp1252"}, FEW_LETTERS])
def test_what_a_pipe_cannot_hold_ends_no_command(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "rooms.csv").write_text(ROWS, "utf-8")
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    done = ask(tmp_path, "init", "rooms.csv", "--json", **environment)
    assert done.returncode == 0, done.stderr
    assert "文本" in json.loads(done.stdout.decode(encoding))["because"][0]
    shown = ask(tmp_path, "recipes", COLUMNS="40", **environment)
    assert shown.returncode == 0, shown.stderr
    assert ("→" in shown.stdout.decode(encoding)) == (encoding == "utf-8")
    assert b"quickstart" in shown.stdout
