"""The report as a page: axe finds nothing in light, dark and print, it asks for no network, and nothing is wider than the window."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Type
from tests.e2e.test_apps import npm_packages
from tests.e2e.test_classifier import classified  # noqa: F401
from tests.e2e.test_speech import spoken  # noqa: F401

pytestmark = pytest.mark.slow
PACKAGES = '{"dependencies": {"puppeteer-core": "24.43.1", "axe-core": "4.14.1"}}'


def looked_at(page: Path, folder: Path) -> dict[str, Any]:
    """What Chromium shows of a page from disk, at three widths, light, dark and printed."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    shutil.copyfile(Path(__file__).parent / "axe.mjs", folder / "axe.mjs")
    (folder / "node_modules").symlink_to(npm_packages(PACKAGES))
    given = json.dumps({"chromium": chromium})
    done = subprocess.run(
        ["node", "axe.mjs", page], cwd=folder, input=given, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("job", ["finished", "classified", "spoken"])
def test_axe_finds_nothing_and_nothing_is_asked_for(
    job: str, request: pytest.FixtureRequest, tmp_path: Path, typed: Type
) -> None:
    folder = request.getfixturevalue(job)
    assert typed(folder, "qft report recipe.yaml").returncode == 0
    found = looked_at(folder / "runs/recipe/report.html", tmp_path)
    assert found["outside"] == []
    assert len(found["seen"]) == 9
    for one in found["seen"]:
        where = f"{one['scheme']}, {one['width']} px"
        assert one["violations"] == [], where
        assert one["passes"] > 20, where
        assert one["wider"] <= 0, where
