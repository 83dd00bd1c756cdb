"""The shipped recipes as `qft recipes` lists and copies them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qft.cli import cli
from qft.paths import shipped, shipped_recipes
from qft.recipe_index import shipped_index
from qft.recipe_loader import load_recipe


def test_every_shipped_recipe_is_listed_once_with_what_was_measured() -> None:
    index = shipped_index()
    assert [f"recipes/{recipe.name}.yaml" for recipe in index] == shipped_recipes()
    assert all(recipe.job and recipe.model and recipe.time and recipe.memory and recipe.result for recipe in index)


def test_recipes_lists_what_the_table_says() -> None:
    said = json.loads(CliRunner().invoke(cli, ["recipes", "--json"]).stdout)["recipes"]
    table = shipped("recipes/README.md").read_text("utf-8")
    assert len(said) == len(shipped_recipes())
    for recipe in said:
        line = next(line for line in table.splitlines() if line.startswith(f"| [{recipe['name']}.yaml]"))
        assert [cell.strip() for cell in line.split("|")][5:7] == [recipe["memory"], recipe["result"]]


@pytest.mark.parametrize("typed", ["sarcasm", "sarcasm.yaml", "recipes/sarcasm.yaml"])
def test_a_copy_is_the_recipe_and_its_first_lines_name_the_copy(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["recipes", "copy", typed, "mine/jokes.yaml"])
    assert done.exit_code == 0, done.output
    copy = load_recipe(Path("mine/jokes.yaml"))
    assert copy.text.startswith("# qft run mine/jokes.yaml")
    assert copy.recipe == load_recipe(shipped("recipes/sarcasm.yaml"), ["name=jokes"]).recipe


def test_a_copy_writes_over_nothing_unless_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sarcasm.yaml").write_text("mine")
    refused = CliRunner().invoke(cli, ["recipes", "copy", "sarcasm"])
    assert "is there already" in str(refused.exception)
    assert Path("sarcasm.yaml").read_text() == "mine"
    assert CliRunner().invoke(cli, ["recipes", "copy", "sarcasm", "--force"]).exit_code == 0
    assert Path("sarcasm.yaml").read_text().startswith("# qft run sarcasm.yaml")
