"""What the shipped recipes do and came to: the first table of recipes/README.md, the only place where that is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qft.paths import shipped


@dataclass(frozen=True)
class ShippedRecipe:
    """A line of the table. name: as `qft run` takes it. Empty where it was not measured."""

    name: str
    job: str
    model: str
    time: str
    memory: str
    result: str


def shipped_index() -> list[ShippedRecipe]:
    """Every line of the table, in its order."""
    lines = shipped("recipes/README.md").read_text("utf-8").splitlines()
    found = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if match := re.match(r"\[(\S+)\.yaml\]\(", cells[0]):
            found.append(ShippedRecipe(match[1], *cells[1:]))
    return found
