"""qft.run and qft.Bundle as a Python program uses them, and the Python lines of docs/, on bundles of every task."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qft
from qft.bundle import manifest
from qft.errors import InputError
from tests.e2e.test_classifier import classified  # noqa: F401
from tests.e2e.test_question_answering import reading  # noqa: F401
from tests.e2e.test_search import searched  # noqa: F401
from tests.e2e.test_speech import spoken  # noqa: F401
from tests.e2e.test_translation import translated  # noqa: F401

pytestmark = pytest.mark.slow
INT4 = "runs/recipe/bundles/cpu-int4"
PAGES = {  # of docs/, and the fixture with a bundle for its lines
    "generate": "finished",
    "classify": "classified",
    "answer": "reading",
    "translate": "translated",
    "transcribe": "spoken",
    "search": "searched",
}
DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", PAGES)
def test_the_python_lines_of_a_page_run(page: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle = request.getfixturevalue(PAGES[page]) / INT4
    code = re.findall(r"^```python\n(.*?)^```$", (DOCS / f"{page}.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)[0]
    (path,) = set(re.findall(r'Bundle\.load\("(.*?)"\)', code))
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).symlink_to(bundle)
    if (bundle / "golden/0.wav").exists():
        shutil.copyfile(bundle / "golden/0.wav", tmp_path / "talk.wav")
    code += "\nimport sys\nassert 'torch' not in sys.modules\n"
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or page in ("transcribe", "translate")  # random layers may say nothing


def test_a_bundle_says_what_the_command_says_and_refuses_what_it_is_not_for(classified: Path) -> None:  # noqa: F811
    bundle, plain = qft.Bundle.load(classified / INT4), manifest.Bundle.load(classified / INT4)
    (expected,) = plain.classify(["dull and slow at home"], plain.runner())
    assert bundle.classify("dull and slow at home") == expected
    for refused in (
        lambda: bundle.generate("dull"),
        lambda: bundle.answer("where", "at home"),
        lambda: bundle.translate("dull"),
        lambda: bundle.transcribe("talk.wav"),
        lambda: bundle.embed("dull"),
    ):
        with pytest.raises(InputError, match=r"a bundle for text-classification does not .*\n? *ask it with classify"):
            refused()


def test_a_language_model_chooses_among_its_labels_or_others(finished: Path) -> None:
    bundle = qft.Bundle.load(finished / INT4)
    assert bundle.classify("dull and slow at home").text in ("positive", "negative")
    assert bundle.classify("dull and slow at home", ["good", "bad"]).text in ("good", "bad")


def test_vectors_of_one_text_and_of_several(searched: Path) -> None:  # noqa: F811
    bundle = qft.Bundle.load(searched / INT4)
    one, several = bundle.embed("dull and slow"), bundle.embed(["a fine film", "dull and slow"])
    assert (one.shape, several.shape, one.dtype) == ((64,), (2, 64), np.float32)
    np.testing.assert_allclose(one, several[1], atol=1e-6)


def test_run_gives_what_the_command_made_and_takes_keys_for_a_file(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    found = qft.run("recipe.yaml")  # what is done is skipped
    assert found.folder == Path("runs/recipe")
    assert found.report.exists()
    assert qft.Bundle.load(found.bundles["cpu-int4"]).task == "text-generation"
    recorded = json.loads((found.bundles["cpu-int4"] / "qft.json").read_text())
    assert found.quality["shipped (cpu-int4)"].value == recorded["quality"]["value"]
    assert list(found.quality)[:3] == ["base", "tuned", "merged"]
    with pytest.raises(InputError, match="unknown key trainig"):
        qft.run({"model": "m", "data": {"train": "rows.jsonl"}, "trainig": {}}, runs=tmp_path)
    with pytest.raises(InputError, match="config.json"):
        qft.run({"name": "keys", "model": str(tmp_path), "data": {"train": "rows.jsonl"}}, runs=tmp_path)
