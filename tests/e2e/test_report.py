"""Every report, and a comparison: axe finds nothing, no network is asked for; kept answers give the metrics that were measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qft.cli.options import made_job
from qft.measure.scores import score_of
from qft.runfolder import RunFolder
from qft.stages.compare import compared
from tests.e2e.browser import chromium, npm_packages
from tests.e2e.conftest import Type
from tests.e2e.test_classifier import classified  # noqa: F401
from tests.e2e.test_question_answering import reading  # noqa: F401
from tests.e2e.test_search import searched  # noqa: F401
from tests.e2e.test_speech import spoken  # noqa: F401
from tests.e2e.test_translation import translated  # noqa: F401

pytestmark = pytest.mark.slow
JOBS = ["finished", "classified", "reading", "spoken", "translated", "searched"]
PACKAGES = '{"dependencies": {"puppeteer-core": "24.43.1", "axe-core": "4.14.1"}}'


def looked_at(page: Path, folder: Path) -> dict[str, Any]:
    """What Chromium shows of a page from disk, at three widths, light, dark and printed."""
    shutil.copyfile(Path(__file__).parent / "axe.mjs", folder / "axe.mjs")
    (folder / "node_modules").symlink_to(npm_packages(PACKAGES))
    given = json.dumps({"chromium": chromium()})
    done = subprocess.run(
        ["node", "axe.mjs", page], cwd=folder, input=given, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_clean(page: Path, folder: Path) -> None:
    """At every width and in every colour: no violation, nothing wider than the window, no network."""
    found = looked_at(page, folder)
    assert found["outside"] == []
    assert len(found["seen"]) == 9
    for one in found["seen"]:
        where = f"{one['scheme']}, {one['width']} px"
        assert one["violations"] == [], where
        assert one["passes"] > 20, where
        assert one["wider"] <= 0, where


@pytest.mark.parametrize("job", JOBS)
def test_axe_finds_nothing_and_nothing_is_asked_for(
    job: str, request: pytest.FixtureRequest, tmp_path: Path, typed: Type
) -> None:
    folder = request.getfixturevalue(job)
    assert typed(folder, "qft report recipe.yaml").returncode == 0
    assert_clean(folder / "runs/recipe/report.html", tmp_path)


def test_axe_finds_nothing_in_a_comparison(
    finished: Path,
    classified: Path,  # noqa: F811
    tmp_path: Path,
    typed: Type,
) -> None:
    """Of two tasks: recipes that say much otherwise, and stages that one of them has alone."""
    done = typed(tmp_path, f"qft compare {finished}/runs/recipe {classified}/runs/recipe --html page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text("utf-8")
    for words in ("What the recipes say otherwise", "text-classification", "accuracy", "peak memory"):
        assert words in page
    assert_clean(tmp_path / "page.html", tmp_path)


@pytest.mark.parametrize("job", JOBS)
def test_a_metric_out_of_kept_answers_is_the_one_that_was_measured(job: str, request: pytest.FixtureRequest) -> None:
    found = compared(made_job(RunFolder(request.getfixturevalue(job) / "runs/recipe")))
    assert {"tuned", "shipped (cpu-int4)"} <= {step.name for step in found.summary.waterfall}
    for step in found.summary.waterfall:
        for metric, value in ((step.quality.metric, step.quality.value), ("loss", step.quality.loss)):
            score = score_of(metric, found.answers[step.name], found.labels)
            assert score is not None
            assert score.of() == pytest.approx(value, rel=1e-9), (step.name, metric)
