from __future__ import annotations

from pathlib import Path

import pytest

from qft.errors import InputError
from qft.paths import shipped_recipes
from qft.recipe_loader import load_recipe
from qft.recipe_reference import json_schema, reference_rows

GOOD = "model: m\ndata: {train: rows.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD + "training: {learning_rate: 2e-4}\n")).recipe
    assert recipe.training.learning_rate == 2e-4


def test_yes_and_no_are_words_not_booleans(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD.replace("rows.jsonl", "rows.jsonl, bins: {no: '<= 1', yes: '> 1'}"))
    ).recipe
    assert recipe.data.bins == {"no": "<= 1", "yes": "> 1"}


def test_the_name_is_the_files_name_unless_given(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD)).recipe.name == "job"
    assert load_recipe(write(tmp_path, GOOD), ["name=other"]).recipe.name == "other"


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = (
        "modle: x\nmodel: 3\nlora: {rank: 4, alpha: -1}\ndata:\n  train: rows.jsonl\n  format: mesages\ntraining: 5\n"
    )
    found = problems(write(tmp_path, text))
    assert len(found) == 6
    for line, words in [
        (1, "write model"),
        (2, "model must be text, not 3"),
        (3, "write lora.r"),
        (3, "lora.alpha must be a number greater than 0"),
        (6, "did you mean messages?"),
        (7, "training must hold keys"),
    ]:
        assert any(f"job.yaml:{line}: " in problem and words in problem for problem in found), (line, words, found)


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("lora_r", "lora.r"),
        ("base_model", "model"),
        ("per_device_train_batch_size", "training.batch_size"),
        ("lr", "training.learning_rate"),
    ],
)
def test_other_tools_words_are_answered_with_ours(tmp_path: Path, word: str, ours: str) -> None:
    assert any(f"write {ours}" in problem for problem in problems(write(tmp_path, GOOD + f"{word}: 8\n")))


def test_a_key_written_twice_is_an_error(tmp_path: Path) -> None:
    assert "is written twice" in problems(write(tmp_path, GOOD + "model: n\n"))[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("- a\n- b\n", "mapping of keys"),
        ("model: [m\n", "not YAML"),
        ("model: m\n\tdata: 3\n", "tabs"),
        ("model: !!python/object:os.system x\n", "is not read here"),
        ("a: &a [*a]\n", ""),
    ],
)
def test_what_is_no_recipe_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    assert words in "\n".join(problems(write(tmp_path, text)))


def test_an_override_that_is_wrong_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    assert "on the command line" in problems(write(tmp_path, GOOD), "training.epochs=-1")[0]
    assert "write key=value" in problems(write(tmp_path, GOOD), "epochs")[0]


def test_a_missing_recipe_names_the_nearest_shipped_one(tmp_path: Path) -> None:
    assert "recipes/quickstart.yaml" in problems(tmp_path / "quikstart.yaml")[0]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name: str) -> None:
    from qft.paths import find_recipe

    assert load_recipe(find_recipe(name, Path("/nowhere"))).recipe.model


def test_the_reference_has_every_key_once_with_help() -> None:
    rows = reference_rows()
    assert len({row.key for row in rows}) == len(rows) > 40
    assert all(row.help for row in rows)
    assert set(json_schema()["required"]) == {"model", "data"}
