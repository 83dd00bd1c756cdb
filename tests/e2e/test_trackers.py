"""Trackers that a recipe names: a missing package is said before anything is done; TensorBoard reads what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RECIPE
from tests.e2e.conftest import Type

PACKAGES = ["tensorboard==2.20.0", "absl-py==2.3.1"]
READ = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
print(json.dumps({tag: [[one.step, one.value] for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, reviews: list[dict[str, str]]) -> Path:
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model))
    return tmp_path


def test_a_tracker_without_its_package_is_one_error_before_the_run_starts(job: Path, typed: Type) -> None:
    done = typed(job, "qft tune recipe.yaml training.trackers=[wandb,comet_ml]")
    assert done.returncode == 2
    assert "training.trackers: wandb and comet-ml are not installed" in done.stderr
    assert "python -m pip install wandb comet-ml" in done.stderr
    assert not (job / "runs/recipe/data").exists()
    done = typed(job, "qft tune recipe.yaml training.trackers=[tensorbord]")
    assert done.returncode == 2
    assert "tensorboard" in done.stderr


@pytest.mark.slow
def test_tensorboard_shows_every_step_of_the_run(job: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *PACKAGES]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("pip reaches no registry")
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=job, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "qft", "tune", "recipe.yaml", "training.trackers=[tensorboard]")
    shown = json.loads(run("-c", READ, "runs/recipe/trackers/recipe"))
    lines = [json.loads(line) for line in (job / "runs/recipe/metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "tokens"):
        assert [step for step, _ in shown[name]] == [line["step"] for line in lines]
        assert [value for _, value in shown[name]] == pytest.approx([line[name] for line in lines], rel=1e-6)
    looks = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert looks
    assert [value for _, value in shown["validation_loss"]] == pytest.approx(looks, rel=1e-6)
