"""The real openai client for Node against a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qft.bundle.manifest import Bundle
from tests.serve.conftest import serving

pytestmark = pytest.mark.serve
OPENAI = "openai@7"


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client in it."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module"}')
    line = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", OPENAI]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install {OPENAI}: {done.stderr.strip()[-200:]}")
    shutil.copy(Path(__file__).with_name("openai_node.mjs"), folder)
    return folder


def test_openai_node_gets_what_the_bundles_say(node_folder: Path, text_bundle: Path, search_bundle: Path) -> None:
    bundle = Bundle.load(text_bundle)
    (expected,) = bundle.answer(["a fine film at home"], bundle.runner(), max_new_tokens=16)
    with serving(text_bundle, key="abc") as served, serving(search_bundle) as searched:
        environment = {**os.environ, "URL": served.url, "KEY": "abc", "SEARCH_URL": searched.url}
        done = subprocess.run(
            ["node", "openai_node.mjs"], cwd=node_folder, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == ["tiny"]
    assert found["chat"]["choices"][0]["message"]["content"] == found["streamed"] == expected.text
    assert found["chat"]["usage"]["completion_tokens"] == expected.tokens
    assert found["completion"]
    assert isinstance(found["json"]["score"], int)
    assert found["call"]["name"] == "note"
    assert isinstance(json.loads(found["call"]["arguments"])["score"], int)
    assert found["error"] == ["NotFoundError", 404, "model_not_found"]
    assert found["refused"] == "AuthenticationError"
    search = Bundle.load(search_bundle)
    vectors = [one.embedding for one in search.embed(["a fine film", "dull and slow"], search.runner())]
    np.testing.assert_allclose(found["vectors"], vectors, atol=1e-6)
    np.testing.assert_allclose(found["floats"], vectors, atol=1e-6)
