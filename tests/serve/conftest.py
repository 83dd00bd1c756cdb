"""Bundles with random weights, and `qft serve` as a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from qft.bundle.assets import copy_tokenizer
from qft.bundle.manifest import update
from qft.data.tokenizer import TextTokenizer
from tests.e2e.browser import chromium, puppeteer


@dataclass(frozen=True)
class Served:
    """A running server. process: to be looked at and interrupted; card: what it said when it was ready."""

    url: str
    process: subprocess.Popen[str]
    card: dict[str, Any]

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """JSON to a path."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def metrics(self) -> dict[str, float]:
        """Name with its labels → value."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def seen_on(url: str, folder: Path, *turns: dict[str, str]) -> dict[str, Any]:
    """What Chromium shows of the built-in page after each turn's fields were filled and sent; skips where there is no Chromium."""
    given = json.dumps({"chromium": chromium(), "turns": turns})
    shutil.copyfile(Path(__file__).with_name("page.mjs"), folder / "page.mjs")
    (folder / "node_modules").symlink_to(puppeteer())
    words = ["node", "page.mjs", url]
    done = subprocess.run(words, cwd=folder, input=given, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["outside"]
    assert not found["errors"]
    return found


Serving = Callable[..., Any]


@contextmanager
def serving(bundle: Path, *options: str, key: str = "", code: str = "") -> Iterator[Served]:
    """`qft serve BUNDLE --port 0 …` until the block ends. code: Python to run before it, in its process."""
    line = ["serve", str(bundle), "--port", "0", "--json", *options]
    start = ["-m", "qft", *line]
    if code:
        start = ["-c", f"import sys; sys.argv = ['qft', *{line!r}]\n{code}\nfrom qft.cli import main\nmain()"]
    environment = {**os.environ, "QFT_KEY": key, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *start], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = process.stdout.readline()
        assert ready, process.stderr.read()
        card = json.loads(ready)
        assert "error" not in card, card
        yield Served(card["url"], process, card)
    finally:
        process.kill()
        process.wait()


def make_bundle(model: Path, folder: Path, task: str, **facts: Any) -> Path:
    """A model's folder as a float bundle, without a run."""
    from qft.graph.export_optimum import export_float
    from qft.tasks.registry import find_task

    kind = find_task(task)
    (folder / "onnx").mkdir(parents=True)
    export_float(model, folder / "onnx", graphs=kind.graphs, export_task=kind.export_task)
    copy_tokenizer(model, folder)
    models = {graph: f"onnx/{graph}.onnx" for graph in kind.graphs}
    shutil.copyfile(model / "config.json", folder / "config.json")
    if (model / "generation_config.json").exists():
        shutil.copyfile(model / "generation_config.json", folder / "generation_config.json")
    TextTokenizer.load(folder)
    common = {"name": "tiny", "target": "float", "task": task, "model": [*models.values()][-1], "models": models}
    update(
        folder,
        **common,
        **{"labels": [], "several_labels": False, "max_length": 64, "prompt": None, "system": None, **facts},
    )
    return folder


@pytest.fixture(scope="session")
def text_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that was taught to judge, in a conversation."""
    folder = tmp_path_factory.mktemp("bundles") / "text"
    make_bundle(tiny_model, folder, "text-generation", system="Judge.", labels=["positive", "negative"])
    config = json.loads((folder / "config.json").read_text())
    longer = config | {"max_position_embeddings": 1024}  # it rotates positions: no table ends; tools take 450 tokens
    (folder / "config.json").write_text(json.dumps(longer))
    return folder


@pytest.fixture(scope="session")
def search_bundle(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of vectors with random weights."""
    folder = tmp_path_factory.mktemp("bundles") / "search"
    return make_bundle(tiny_encoder, folder, "sentence-similarity", keys={"temperature": 0.05}, max_length=12)


@pytest.fixture(scope="session")
def served(text_bundle: Path) -> Iterator[Served]:
    """A server of the language model."""
    with serving(text_bundle) as found:
        yield found
