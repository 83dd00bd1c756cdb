"""Known bases: what `qft models` lists and `qft init` chooses from."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner, Result

from qft.cli import cli
from qft.known_bases import fitting, known_bases
from qft.recipe_index import shipped_index
from qft.tasks.registry import find_task


def models(*words: str) -> Result:
    return CliRunner().invoke(cli, ["models", *words])


def test_every_base_is_for_tasks_that_there_are() -> None:
    for base in known_bases():
        assert base.tasks
        for task in base.tasks:
            find_task(task)


def test_every_task_but_translation_has_a_base_that_needs_no_hub() -> None:
    without = {task for base in known_bases() if not base.on_hub for task in base.tasks}
    assert without == {task for base in known_bases() for task in base.tasks} - {"translation"}


def test_every_base_of_the_shipped_recipes_is_known() -> None:
    names = [base.name for base in known_bases()]
    assert all(any(name.startswith(recipe.model) for name in names) for recipe in shipped_index())


def test_predicted_memory_is_near_what_the_shipped_recipes_took() -> None:
    """Within a factor of 1.6 either way: batches and lengths, which are not looked at, differ by as much."""
    measured = 0
    for recipe in shipped_index():
        if not (found := re.match(r"([0-9.]+) GB", recipe.memory)):
            continue
        base = next(base for base in known_bases() if base.name.startswith(recipe.model))
        assert 1 / 1.6 < base.run_bytes / (float(found[1]) * 1e9) < 1.6, recipe.name
        measured += 1
    assert measured >= 6


def test_what_fits_task_language_and_memory() -> None:
    listed = json.loads(models("--task", "question-answering", "--language", "zh", "--memory", "5GB", "--json").stdout)
    assert [base["id"] for base in listed["models"]] == ["google-bert/bert-base-chinese"]
    assert all(base.knows("de", "en") for base in fitting(languages=("de", "en")))
    assert not fitting(memory_bytes=10**9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--task", "question"), "question-answering"),
        (("--memory", "lots"), "write 4GB"),
        (("--memory", "10MB"), "no known base fits"),
    ],
)
def test_what_cannot_be_listed_is_answered_with_what_can(words: tuple[str, ...], said: str) -> None:
    done = models(*words)
    assert said in str(done.exception)
    assert getattr(done.exception, "exit_code", None) == 2
