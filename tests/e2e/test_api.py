"""qft.run and qft.Bundle as a Python program uses them, and what README and docs/ type, on bundles of every task."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qft
from qft.bundle import manifest
from qft.errors import InputError
from qft.paths import shipped
from tests.e2e.test_apps import installed, run
from tests.e2e.test_classifier import classified  # noqa: F401
from tests.e2e.test_question_answering import reading  # noqa: F401
from tests.e2e.test_search import searched  # noqa: F401
from tests.e2e.test_speech import spoken  # noqa: F401
from tests.e2e.test_translation import translated  # noqa: F401
from tests.serve.conftest import serving

pytestmark = pytest.mark.slow
INT4 = "runs/recipe/bundles/cpu-int4"
ROOT = Path(__file__).parents[2]
PAGES = {  # and the fixture with a bundle for its lines
    "README.md": "finished",
    "docs/generate.md": "finished",
    "docs/classify.md": "classified",
    "docs/answer.md": "reading",
    "docs/translate.md": "translated",
    "docs/transcribe.md": "spoken",
    "docs/search.md": "searched",
}
MAY_SAY_NOTHING = ("docs/transcribe.md", "docs/translate.md")  # random layers


def blocks(page: str, kind: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def folder_of(page: str, run: Path, folder: Path) -> Path:
    """A folder in which the page's lines find what they name: its run, which is another's, and files that they read."""
    (name,) = {
        found for code in blocks(page, "python") for found in re.findall(r"runs/([\w-]+)/bundles/cpu-int4", code)
    }
    (folder / "runs").mkdir()
    (folder / "runs" / name).symlink_to(run)
    (folder / "strings.txt").write_text("dull and slow\na fine film\n")
    (folder / "order.json").write_text('{"type": "object", "properties": {"score": {"type": "boolean"}}}')
    sound = run / "bundles/cpu-int4/golden/0.wav"
    if sound.exists():
        shutil.copyfile(sound, folder / "talk.wav")
    return folder


def done_in(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))]
)
def test_the_python_lines_of_a_page_run(page: str, number: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    code = blocks(page, "python")[number]
    if "sentence_transformers" in code:
        pytest.importorskip("sentence_transformers")
    made = request.getfixturevalue(PAGES[page]) / "runs/recipe"
    folder = folder_of(page, made, tmp_path)
    if "import qft" in code:
        code += "\nimport sys\nassert 'torch' not in sys.modules\n"
    if "OpenAI(" in code:
        with serving(made / "bundles/cpu-int4") as served:
            code = code.replace("http://127.0.0.1:8000", served.url).replace('model="quickstart"', 'model="recipe"')
            assert done_in(folder, sys.executable, "-c", code).strip()
    else:
        said = done_in(folder, sys.executable, "-c", code).strip()
        assert said or page in MAY_SAY_NOTHING or "print(" not in code


@pytest.mark.parametrize("page", PAGES)
def test_the_questions_that_a_page_types_are_answered(
    page: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    typed_in = [shlex.split(line, comments=True) for code in blocks(page, "bash") for line in code.splitlines()]
    lines = [words for words in typed_in if words[:2] == ["qft", "predict"]]
    assert lines
    folder = folder_of(page, request.getfixturevalue(PAGES[page]) / "runs/recipe", tmp_path)
    for words in lines:
        if "--among" in words and PAGES[page] != "searched":
            continue
        said = done_in(folder, sys.executable, "-m", *words).strip()
        assert said or page in MAY_SAY_NOTHING, words


@pytest.mark.apps
def test_the_lines_for_node_of_the_page_on_search_give_vectors(searched: Path, tmp_path: Path) -> None:  # noqa: F811
    (code,) = blocks("docs/search.md", "js")
    (tmp_path / "bundle").symlink_to(searched / INT4)
    shutil.copyfile(shipped("export/apps/node/package.json"), tmp_path / "package.json")
    app = installed(tmp_path)
    (app / "embed.mjs").write_text(f"{code}console.log(JSON.stringify(vectors.tolist()));\n")
    (theirs,) = json.loads(run(app, "node", "embed.mjs"))
    ours = qft.Bundle.load(searched / INT4).embed("publish the page")
    assert (np.array(theirs) * ours).sum() > 0.999  # onnxruntime's kernels, of another release


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
