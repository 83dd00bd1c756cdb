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
    assert "2 test rows are also among the rows to learn" in typed(tmp_path, "qft plan recipe.yaml").stdout
    wrong = typed(tmp_path, "qft plan recipe.yaml data.train={positive:3}")
    assert wrong.returncode == 2
    assert "data.train" in wrong.stderr
