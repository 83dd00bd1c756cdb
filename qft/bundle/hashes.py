"""A bundle's files and their hashes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qft.errors import Problem
from qft.files import sha256_file

NAME = "qft.json"  # holds the hashes, and has none


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a bundle but qft.json, by its name inside the bundle."""
    return {
        p.relative_to(folder).as_posix(): sha256_file(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != NAME and not p.name.startswith(".")
    }


def changed_files(folder: Path, expected: Mapping[str, str]) -> list[Problem]:
    """Files that are missing, changed or not listed; empty if the bundle is as it was made."""
    there = file_hashes(folder)
    found = [Problem("is missing", name) for name in expected if name not in there]
    found += [
        Problem("has changed since the bundle was made", name)
        for name in expected
        if name in there and there[name] != expected[name]
    ]
    return found + [Problem("is not part of the bundle", name) for name in there if name not in expected]
