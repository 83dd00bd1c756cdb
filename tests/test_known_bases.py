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


def test_minutes_are_guessed_from_the_weights_and_this_processor() -> None:
    listed = json.loads(models("--json").stdout)
    speed = listed["product_operations_per_second"]
    assert 1e9 < speed < 1e14
    small, large = (
        next(b for b in listed["models"] if b["name"].startswith(name)) for name in ("all-MiniLM", "Gemma 3")
    )
    ratio = large["guessed_learning_seconds"] / small["guessed_learning_seconds"]
    assert ratio == pytest.approx(large["millions"] / small["millions"])
    base = next(base for base in known_bases() if base.name.startswith("SmolLM2-135M"))
    assert listed["tokens"] / base.learning_seconds(listed["tokens"], 350e9) == pytest.approx(654, rel=0.05)  # README's
    said = " ".join(models("--memory", "7GB").stdout.split())
    assert "a guess from the weights" in said
    minutes = [float(found) for found in re.findall(r"about ([\d.]+) min to learn", said)]
    assert len(minutes) >= 5
    assert max(minutes) > min(minutes) >= 0


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
