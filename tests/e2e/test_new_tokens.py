"""Tokens that the base lacks, from the recipe to what the shipped bundle answers."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import RECIPE
from tests.e2e.conftest import Type, as_json

TOKENS = {"positive": "<good>", "negative": "<bad>"}


def test_a_bundle_reads_and_writes_new_tokens(
    tmp_path: Path, tiny_model: Path, reviews: list[dict[str, str]], typed: Type
) -> None:
    from transformers import AutoTokenizer

    rows = [{"text": row["text"], "label": TOKENS[row["label"]]} for row in reviews]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model))
    words = "data.new_tokens=[<good>,<bad>] quantization.base=none"
    words += " training.learning_rate=2e-3 training.epochs=20"
    found = as_json(typed(tmp_path, f"qft run recipe.yaml {words} --json"))
    steps = {step["stage"]: step for step in found["waterfall"]}
    assert steps["base"]["value"] == 0  # a token that was never learnt
    assert steps["tuned"]["value"] > 60
    assert abs(steps["exported"]["loss"] - steps["tuned"]["loss"]) < 0.02  # merged into bfloat16
    bundle = Path(found["bundle"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / bundle)
    assert len(theirs("<good><bad>")["input_ids"]) == 2
    said = as_json(typed(tmp_path, "qft predict --json", stdin="a fine film in town"))["answers"][0]
    assert said["text"] in TOKENS.values()
    assert as_json(typed(tmp_path, "qft check --json"))["agrees"]
    done = typed(tmp_path, f"qft plan recipe.yaml name=a {words} tuning.method=head")
    assert (done.returncode, "data.new_tokens" in done.stderr) == (2, True)
