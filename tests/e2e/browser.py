"""Chromium and packages of npm, for tests that look at pages as users do; they skip where there are none."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from qft.files import exclusive, folder_aside
from qft.sources import cache_folder


def chromium() -> str:
    """The program."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    return found


def puppeteer() -> Path:
    """node_modules with what drives it."""
    return npm_packages('{"dependencies": {"puppeteer-core": "24.43.1"}}')


@functools.cache
def npm_packages(package_json: str) -> Path:
    """node_modules of a package.json, installed once and kept beside qft's other caches; skips where npm cannot."""
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("node and npm are not installed (apt-get install nodejs npm)")
    folder = cache_folder() / "npm" / hashlib.sha256(package_json.encode()).hexdigest()[:12]
    with exclusive(folder.with_suffix(".lock"), wait=True):
        if not folder.exists():
            with folder_aside(folder) as aside:
                (aside / "package.json").write_text(package_json)
                words = ["npm", "install", "--ignore-scripts", "--no-fund", "--no-audit"]
                done = subprocess.run(words, cwd=aside, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"npm reaches no registry: {done.stderr.strip().splitlines()[-1]}")
    return folder / "node_modules"
