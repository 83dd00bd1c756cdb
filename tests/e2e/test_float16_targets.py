"""The whole path to targets for cards, opened on a processor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qft.bundle.manifest import Bundle
from tests.e2e.conftest import Type, as_json
from tests.e2e.test_apps import exported, installed, run, seen


@pytest.mark.slow
def test_a_run_ships_float16_targets_that_answer_on_a_processor_as_they_were_measured(
    recipe_folder: Path, typed: Type
) -> None:
    planned = as_json(typed(recipe_folder, "qft plan recipe.yaml --json"))
    assert planned["tuning"]["device"] in ("cpu", "cuda", "mps")
    assert planned["tuning"]["batch_size"] * planned["tuning"]["accumulation"] == 8
    assert planned["predicted_run_bytes"] > 1e9
    done = typed(recipe_folder, "qft run recipe.yaml export.targets=[cuda-int4,cuda-fp16,web-int4] --json")
    assert done.returncode == 0, done.stderr
    for target, suffix in (("cuda-int4", "q4f16"), ("cuda-fp16", "fp16"), ("web-int4", "q4f16")):
        folder = recipe_folder / "runs/recipe/bundles" / target
        assert (folder / f"onnx/model_{suffix}.onnx").exists()
        written = json.loads((folder / "config.json").read_text())["transformers.js_config"]
        assert written["dtype"] == suffix
        assert written["kv_cache_dtype"] == {suffix: "float16"}
        assert typed(recipe_folder, f"qft check --bundle {folder}").returncode == 0
        (answer,) = Bundle.load(folder).answer(
            ["a joy to watch at home"], Bundle.load(folder).runner(), max_new_tokens=8
        )
        assert answer.text in ("positive", "negative")
        app = exported("python", folder, recipe_folder / target)
        assert json.loads(run(app, sys.executable, "answer.py", "--check"))["agrees"]
        assert run(app, sys.executable, "answer.py", "a joy to watch at home").strip() == answer.text
    refused = typed(recipe_folder, "qft export --app cpp runs/recipe/bundles/cuda-int4 app")
    assert refused.returncode == 2
    assert "does not run float16 graphs" in refused.stderr
    sizes = [sum(p.stat().st_size for p in (recipe_folder / f"runs/recipe/bundles/{name}/onnx").iterdir())
             for name in ("float", "cuda-fp16")]  # fmt: skip
    assert sizes[1] < 0.75 * sizes[0]
    _opened_in_node_and_on_a_page(folder, answer.text, recipe_folder)


def _opened_in_node_and_on_a_page(bundle: Path, answer: str, folder: Path) -> None:
    """On processors: Chromium's software adapter for WebGPU has no float16."""
    app = installed(exported("node", bundle, folder / "node"))
    assert json.loads(run(app, "node", "answer.mjs", "--check"))["agrees"]
    assert run(app, "node", "answer.mjs", "a joy to watch at home").strip() == answer
    page = seen(installed(exported("web", bundle, folder / "web")), ["a joy to watch at home"], "wasm", folder)
    assert page["checked"].startswith("Yes: same "), page["checked"]
    assert page["answers"] == [answer]
