"""Trackers that a recipe names: a missing package is said before anything is done; what was trained is read back from them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qft.errors import InputError
from qft.training.trackers import tracking
from tests.conftest import RECIPE
from tests.e2e.conftest import Type

TENSORBOARD = ["tensorboard==2.20.0", "absl-py==2.3.1"]
MLFLOW = [
    "mlflow-skinny==3.17.2", "cachetools==8.0.2", "cloudpickle==3.1.3", "databricks-sdk==0.162.0", "gitpython==3.2.1",
    "gitdb==4.0.12", "smmap==5.0.3", "importlib-metadata==8.7.0", "zipp==4.1.2", "opentelemetry-api==1.45.2",
    "opentelemetry-proto==1.45.2", "opentelemetry-sdk==1.45.2", "opentelemetry-semantic-conventions==0.66b2",
    "python-dotenv==1.2.4", "sqlparse==0.6.1",
]  # fmt: skip
WANDB = ["wandb==0.31.0", "platformdirs==4.14.8", "gitpython==3.2.1", "gitdb==4.0.12", "smmap==5.0.3"]
READ = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
print(json.dumps({tag: [[one.step, one.value] for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""


# wandb's file is LevelDB's log: blocks of 32 KiB, in them pieces of a record, each after its sum, length and kind.
READ_WANDB = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record
data, place, whole, told = open(sys.argv[1], "rb").read(), 7, b"", []
while place + 7 <= len(data):
    if 32768 - place % 32768 < 7:
        place += 32768 - place % 32768
        continue
    length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
    whole, place = whole + data[place + 7 : place + 7 + length], place + 7 + length
    if kind in (1, 4):
        items, whole = Record.FromString(whole).history.item, b""
        if items:
            told.append({one.key or one.nested_key[0]: json.loads(one.value_json) for one in items})
print(json.dumps(told))
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


def test_a_tracker_that_does_not_start_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import fails, as that of a broken package
    with (
        pytest.raises(InputError, match=r"training\.trackers: wandb did not start: .*wandb"),
        tracking(["wandb"], "run", tmp_path, {}) as trackers,
    ):
        trackers.step({"step": 1, "loss": 0.5})


@dataclass(frozen=True)
class Place:
    """A job's folder, with packages that only its processes see, and whom these asked for something beyond this machine."""

    folder: Path
    environment: dict[str, str]
    asked: list[bytes]

    def run(self, *words: str, **environment: str) -> str:
        """What Python printed."""
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self.environment | environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def lines(self) -> list[dict[str, float]]:
        """metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "runs/recipe/metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def place(job: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    """Parameter: what pip is to install."""
    packages = tmp_path / "packages"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *request.param]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("pip reaches no registry")
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        threading.Thread(target=_refuse, args=(proxy, asked), daemon=True).start()
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = {name: url for word in ("http_proxy", "https_proxy") for name in (word, word.upper())}
        own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "NO_PROXY": "", "no_proxy": ""}
        yield Place(job, {**os.environ, **proxies, **own}, asked)


def _refuse(proxy: socket.socket, asked: list[bytes]) -> None:
    """A proxy that notes who is asked for, and hangs up."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = proxy.accept()
            with connection:
                asked.append(connection.recv(200))


@pytest.mark.slow
@pytest.mark.parametrize("place", [TENSORBOARD], indirect=True, ids=["tensorboard"])
def test_tensorboard_shows_every_step_of_the_run(place: Place) -> None:
    place.run("-m", "qft", "tune", "recipe.yaml", "training.trackers=[tensorboard]")
    shown, lines = json.loads(place.run("-c", READ, "runs/recipe/trackers/recipe")), place.lines()
    for name in ("loss", "learning_rate", "tokens"):
        assert [step for step, _ in shown[name]] == [line["step"] for line in lines]
        assert [value for _, value in shown[name]] == pytest.approx([line[name] for line in lines], rel=1e-6)
    looks = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert looks
    assert [value for _, value in shown["validation_loss"]] == pytest.approx(looks, rel=1e-6)
    assert place.asked == []


@pytest.mark.slow
@pytest.mark.parametrize("place", [MLFLOW], indirect=True, ids=["mlflow"])
def test_mlflow_keeps_every_step_in_files_and_tells_its_makers_nothing(place: Place) -> None:
    """Its files: a line a step, time, value, step."""
    settings = {"MLFLOW_TRACKING_URI": (place.folder / "kept").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    place.run("-m", "qft", "tune", "recipe.yaml", "training.trackers=[mlflow]", **settings)
    lines = place.lines()
    for name in ("loss", "validation_loss"):
        (file,) = place.folder.glob(f"kept/*/*/metrics/{name}")
        shown = [line.split() for line in file.read_text().splitlines()]
        told = [line for line in lines if name in line]
        assert [int(step) for _, _, step in shown] == [line["step"] for line in told]
        assert [float(value) for _, value, _ in shown] == [line[name] for line in told]
    (epochs,) = place.folder.glob("kept/*/*/params/training.epochs")
    assert epochs.read_text() == "8.0"
    assert place.asked == []


@pytest.mark.slow
@pytest.mark.parametrize("place", [WANDB], indirect=True, ids=["wandb"])
def test_wandb_offline_keeps_every_step_and_asks_for_nothing(place: Place) -> None:
    place.run("-m", "qft", "tune", "recipe.yaml", "training.trackers=[wandb]", WANDB_MODE="offline")
    (file,) = place.folder.glob("wandb/offline-run-*/run-*.wandb")
    shown, lines = json.loads(place.run("-c", READ_WANDB, str(file))), place.lines()
    assert [one["_step"] for one in shown] == [line["step"] for line in lines]
    for name in ("loss", "tokens", "validation_loss"):
        assert [one.get(name) for one in shown] == [line.get(name) for line in lines]
    assert place.asked == []
