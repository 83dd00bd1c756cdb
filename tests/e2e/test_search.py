"""A model for search, the whole path: pairs of one label become a bundle that others read as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qft.bundle.manifest import Bundle
from tests.e2e.conftest import Type, as_json, type_in
from tests.e2e.optimum import golden_agreement

INT4 = "runs/recipe/bundles/cpu-int4"
TEXTS = ["I loved every minute in town", "dull and slow", "a fine film again"]
PACKAGES = ["sentence-transformers==5.1.2"]
READ = """
import json, sys
from sentence_transformers import SentenceTransformer
settings = {"file_name": "onnx/model_q4.onnx"}
model = SentenceTransformer(sys.argv[1], backend="onnx", model_kwargs=settings, device="cpu")
print(json.dumps({"longest": model.max_seq_length, "vectors": model.encode(json.loads(sys.argv[2])).tolist()}))
"""
RECIPE = """\
model: {model}
task: sentence-similarity
quantization: {{compute_dtype: float32}}
data: {{train: reviews.jsonl, eval: 24, validation: 24}}
training: {{epochs: 6, learning_rate: 1e-3, batch_size: 8, max_length: 32, evaluations: 2}}
fold: {{steps: 8}}
verify: {{quantized_top1: 0.5}}
export: {{budget: {{max_worse: 30 points}}}}
bench: {{trials: 2}}
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, reviews: list[dict[str, str]]) -> Path:
    """A folder in which `qft run recipe.yaml` was typed."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_encoder))
    done = type_in(folder, "qft run recipe.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def vectors_of(folder: Path) -> np.ndarray:
    bundle = Bundle.load(folder / INT4)
    return np.array([one.embedding for one in bundle.embed(TEXTS, bundle.runner())])


@pytest.mark.slow
def test_it_has_learnt_and_what_was_trained_is_what_ships(searched: Path, typed: Type) -> None:
    run = as_json(typed(searched, "qft run recipe.yaml --json"))
    steps = {step["stage"]: step for step in run["waterfall"]}
    assert list(steps) == ["base", "tuned", "merged", "exported", "rounded", "folded", "shipped"]
    assert steps["tuned"]["loss"] < steps["base"]["loss"]
    lines = [json.loads(line) for line in (searched / "runs/recipe/metrics.jsonl").read_text().splitlines()]
    best = min(line["validation_loss"] for line in lines if "validation_loss" in line)
    assert run["merge"]["validation_losses"]["dequantized 4-bit base"] == pytest.approx(best, abs=1e-4)
    if run["merge"]["way"] == "dequantized 4-bit base":  # the other one only if it is better beyond chance
        assert steps["merged"]["loss"] == pytest.approx(steps["tuned"]["loss"], abs=1e-3)
    assert steps["exported"]["loss"] == pytest.approx(steps["merged"]["loss"], abs=1e-4)
    assert abs(steps["shipped"]["loss"] - steps["folded"]["loss"]) < 0.05
    found = steps["shipped"]["retrieval"]
    assert steps["shipped"]["value"] == found["recall_1_percent"] <= found["recall_5_percent"]
    assert "recall@10" in (searched / "runs/recipe/report.html").read_text()


@pytest.mark.slow
def test_predict_eval_and_check(searched: Path, typed: Type) -> None:
    (answer,) = as_json(typed(searched, "qft predict --json dull"))["answers"]
    assert answer["input"] == "dull"
    assert np.linalg.norm(answer["embedding"]) == pytest.approx(1, abs=1e-5)
    (searched / "lines.txt").write_text("\n".join(TEXTS))
    done = typed(searched, "qft predict --among lines.txt", stdin=TEXTS[1])
    assert done.stdout.splitlines()[0] == f"1.00  {TEXTS[1]}"
    assert len(done.stdout.splitlines()) == 3
    assert as_json(typed(searched, "qft check --json"))["agrees"]
    assert as_json(typed(searched, "qft eval --json"))["quality"]["metric"] == "recall@1"
    assert "qft export --app web" in (searched / INT4 / "README.md").read_text()
    assert "qft export --app web" in (searched / "runs/recipe/report.html").read_text()
    refused = typed(searched, "qft export --app cpp app")
    assert refused.returncode == 2
    assert "these do: python, node, web" in refused.stderr
    refused = typed(searched, "qft predict --labels a,b dull")
    assert refused.returncode == 2
    refused = typed(searched, "qft run recipe.yaml name=other data.prompt=query:{text}")
    assert "become vectors as they are" in refused.stderr


def test_optimum_agrees_with_the_golden_vectors(searched: Path) -> None:
    agreement = golden_agreement(Bundle.load(searched / INT4))
    assert agreement.positions >= 8
    assert agreement.agrees, agreement


@pytest.mark.slow
def test_optimum_and_sentence_transformers_read_the_folder_as_it_is(searched: Path, tmp_path: Path) -> None:
    """Of float32 sums in another order: 1e-5."""
    from optimum.onnxruntime import ORTModelForFeatureExtraction
    from transformers import AutoTokenizer

    fed = AutoTokenizer.from_pretrained(searched / INT4)(TEXTS, padding=True, return_tensors="pt")
    model = ORTModelForFeatureExtraction.from_pretrained(searched / INT4, subfolder="onnx", file_name="model_q4.onnx")
    states, mask = model(**fed).last_hidden_state.numpy(), fed["attention_mask"].numpy()[..., None]
    means = (states * mask).sum(1) / mask.sum(1)
    ours = vectors_of(searched)
    np.testing.assert_allclose(means / np.linalg.norm(means, axis=1, keepdims=True), ours, atol=1e-5)
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *PACKAGES]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("pip reaches no registry")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", READ, str(searched / INT4), json.dumps(TEXTS)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["longest"] == 32
    np.testing.assert_allclose(found["vectors"], ours, atol=1e-5)
