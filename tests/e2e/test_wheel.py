"""The wheel, installed elsewhere: shipped recipes and targets are in it and run from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SMALL = ["data.max_train_rows=64", "data.eval=16", "data.validation=8", "export.budget.max_worse=100 points"]


@pytest.mark.slow
def test_the_wheel_runs_a_shipped_recipe_from_an_empty_folder(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert (
        "qft/py.typed" in zipfile.ZipFile(wheel).namelist()
    )  # without it a type checker of who installs qft sees none
    home, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, with_pip=True)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, capture_output=True
    )
    # The dependencies of this environment serve the other one: downloading them again would take minutes.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    where = subprocess.run([python, "-c", "import qft; print(qft.__file__)"], cwd=empty, env=environment, check=True,
                           capture_output=True, text=True).stdout  # fmt: skip
    assert str(home) in where
    done = subprocess.run([python, "-m", "qft", "run", "quickstart", "--json", *SMALL], cwd=empty, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [step["stage"] for step in json.loads(done.stdout)["waterfall"]][-1] == "shipped"
    assert {p.name for p in empty.iterdir()} == {"runs"}
