"""`qft plan` on rows as they lie in real files."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import BAD, GOOD
from tests.e2e.conftest import Type, as_json

DATA = "data:\n  train: {positive: good.txt, negative: bad.txt}\n  eval: test.jsonl\n  validation: 2\n"


def test_a_file_for_each_label_and_test_rows_that_were_also_learnt(
    tmp_path: Path, tiny_model: Path, typed: Type
) -> None:
    (tmp_path / "good.txt").write_text("\n".join(GOOD))
    (tmp_path / "bad.txt").write_text("\n".join(BAD))
    test = [{"text": text, "label": "positive"} for text in (GOOD[0].upper(), GOOD[0], "a text of its own")]
    test.append({"text": "another", "label": "negative"})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    (tmp_path / "recipe.yaml").write_text(f"model: {tiny_model}\n{DATA}")
    found = as_json(typed(tmp_path, "qft plan recipe.yaml --json"))
    assert found["data"]["labels"] == {"positive": 6, "negative": 6}
    assert (found["data"]["also_in_train"], found["data"]["leaked"]) == (2, 1)
    assert found["data"]["train_rows"] == 12 - 1 - 2
    assert [Path(source["uri"]).name for source in found["sources"][1:]] == ["good.txt", "bad.txt", "test.jsonl"]
    assert "2 held-out rows are also among the rows to learn" in typed(tmp_path, "qft plan recipe.yaml").stdout
    wrong = typed(tmp_path, "qft plan recipe.yaml data.train={positive:3}")
    assert wrong.returncode == 2
    assert "data.train" in wrong.stderr


def test_changed_copies_are_of_rows_to_learn_and_counted(
    tmp_path: Path, tiny_model: Path, reviews: list[dict[str, str]], typed: Type
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (tmp_path / "words.txt").write_text("film, picture\ndull, boring\n")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\ndata:\n  train: rows.jsonl\n  eval: 20\n  validation: 10\n"
        "  augment: {copies: 2, synonyms: words.txt, synonym: 1}\n"
    )
    found = as_json(typed(tmp_path, "qft plan recipe.yaml --json"))["data"]
    assert 78 < found["changed_copies"] <= 2 * 78
    assert found["train_rows"] == 78 + found["changed_copies"]
    assert (found["validation_rows"], found["eval_rows"]) == (10, 20)
    learnt = (tmp_path / "runs/recipe/data/train.jsonl").read_text().splitlines()
    assert len(learnt) == found["train_rows"]
    assert "changed copies" in typed(tmp_path, "qft plan recipe.yaml").stdout
    done = typed(tmp_path, "qft plan recipe.yaml data.augment.synonyms=nowhere.txt")
    assert done.returncode == 2
    assert "nowhere.txt" in done.stderr


def test_test_rows_from_several_files(
    tmp_path: Path, tiny_model: Path, reviews: list[dict[str, str]], typed: Type
) -> None:
    lines = [json.dumps(row) + "\n" for row in reviews]
    for name, part in {"train": lines[20:], "test": lines[:12], "more": lines[12:20]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\ndata: {{train: train.jsonl, eval: [test.jsonl, more.jsonl], validation: 10}}\n"
    )
    found = as_json(typed(tmp_path, "qft plan recipe.yaml --json"))
    assert (found["data"]["eval_rows"], found["data"]["leaked"]) == (20, 0)
    assert [Path(source["uri"]).name for source in found["sources"][1:]] == ["train.jsonl", "test.jsonl", "more.jsonl"]


def test_sources_are_mixed_by_weight_and_held_out_rows_are_not(
    tmp_path: Path, tiny_model: Path, reviews: list[dict[str, str]], typed: Type
) -> None:
    for name, some in (("a", reviews[:54]), ("b", reviews[54:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\ndata: {{train: [a.jsonl, b.jsonl], weights: [2.5, 0], eval: 20, validation: 10}}\n"
    )
    found = as_json(typed(tmp_path, "qft plan recipe.yaml --json"))["data"]
    first, second = found["mixed"]
    assert first["rows"] + second["rows"] == 78
    assert (first["mixed_rows"], second["mixed_rows"]) == (2 * first["rows"] + round(first["rows"] / 2), 0)
    assert found["train_rows"] == first["mixed_rows"]
    assert (found["validation_rows"], found["eval_rows"]) == (10, 20)
    folder = tmp_path / "runs/recipe/data"
    assert {json.loads(line)["where"].split(":")[0] for line in (folder / "train.jsonl").open()} == {"a.jsonl"}
    assert {json.loads(line)["where"].split(":")[0] for line in (folder / "eval.jsonl").open()} == {
        "a.jsonl",
        "b.jsonl",
    }
    assert "weight 2.5" in typed(tmp_path, "qft plan recipe.yaml").stdout
    wrong = typed(tmp_path, "qft plan recipe.yaml data.weights=[1,2,3]")
    assert wrong.returncode == 2
    assert "data.weights" in wrong.stderr


def test_rows_for_choices_of_a_source_of_their_own_are_in_no_other_part(
    tmp_path: Path, tiny_model: Path, reviews: list[dict[str, str]], typed: Type
) -> None:
    lines = [json.dumps(row) + "\n" for row in reviews]
    for name, part in {"train": lines[8:], "test": lines[:12], "choose": lines[6:20]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\ndata: {{train: train.jsonl, eval: test.jsonl, validation: choose.jsonl}}\n"
    )
    found = as_json(typed(tmp_path, "qft plan recipe.yaml --json"))["data"]
    assert (found["eval_rows"], found["validation_rows"], found["train_rows"]) == (12, 8, len(lines) - 20)
    assert found["leaked"] == 12
    typed(tmp_path, "qft plan recipe.yaml data.eval=10 name=b")
    found = as_json(typed(tmp_path, "qft plan recipe.yaml data.eval=10 name=b --json"))["data"]
    assert (found["eval_rows"], found["validation_rows"]) == (10, 14)


def test_groups_that_share_texts_leak_none_and_rows_in_no_group_are_counted(
    tmp_path: Path, tiny_model: Path, reviews: list[dict[str, str]], typed: Type
) -> None:
    rows = [{**row, "writer": f"writer {number % 27}"} for number, row in enumerate(reviews)]
    rows += [
        {"text": row["text"].upper(), "label": row["label"] * 2, "writer": f"other {n}"}
        for n, row in enumerate(reviews)
    ]
    rows += [{"text": f"alone {number}", "label": "positive", "wrtier": "x"} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\ndata: {{train: rows.jsonl, group_column: writer, eval: 40, validation: 20}}\n"
    )
    found = as_json(typed(tmp_path, "qft plan recipe.yaml --json"))["data"]
    assert found["without_group"] == 9
    assert found["also_in_train"] > 0
    assert found["leaked"] > 0
    lines = {f"rows.jsonl:{number}": row["text"].casefold() for number, row in enumerate(rows, 1)}
    sides = {
        part: {lines[json.loads(line)["where"]] for line in (tmp_path / f"runs/recipe/data/{part}.jsonl").open()}
        for part in ("train", "validation", "eval")
    }
    assert not sides["train"] & (sides["validation"] | sides["eval"])
    assert not sides["validation"] & sides["eval"]
    shown = typed(tmp_path, "qft plan recipe.yaml").stdout
    assert "9 rows have no value in data.group_column" in " ".join(shown.split())
    same = [{"text": "one and the same", "label": label, "writer": label} for label in "abcdefghij"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    refused = typed(tmp_path, "qft plan recipe.yaml data.eval=3 data.validation=3")
    assert refused.returncode == 2
    assert "held out elsewhere" in refused.stderr


def test_a_decoder_is_given_translations_by_the_columns_that_the_recipe_names(
    tmp_path: Path, tiny_model: Path, typed: Type
) -> None:
    rows = [{"en": f"number {n}", "de": f"Nummer {n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\ntranslation: {{source: en, target: de}}\n"
        'data: {train: rows.jsonl, format: translation, prompt: "Auf Deutsch: {en}", eval: 10, validation: 5}\n'
    )
    asked, answer, *_ = as_json(typed(tmp_path, "qft plan recipe.yaml --json"))["rows"][0]["runs"]
    assert "Auf Deutsch: number " in asked["text"]
    assert (answer["in_loss"], "Nummer " in answer["text"]) == (True, True)
    refused = typed(tmp_path, "qft plan recipe.yaml translation.target=nl")
    assert refused.returncode == 2
    assert "translation.target" in refused.stderr
