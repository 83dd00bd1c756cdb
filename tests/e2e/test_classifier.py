"""A classifier's whole path: an encoder with a new head becomes a bundle that onnxruntime and optimum open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qft.bundle.manifest import Bundle
from qft.measure.occlusion import what_carried
from tests.e2e.conftest import Type, as_json, type_in
from tests.e2e.optimum import golden_agreement, opened

RUN = "runs/recipe"
INT4 = f"{RUN}/bundles/cpu-int4"
RECIPE = """\
model: {model}
task: text-classification
quantization: {{compute_dtype: float32}} # random layers tell texts apart by little: bfloat16's rounding would show
data: {{train: reviews.jsonl, eval: 24, validation: 24}}
training: {{epochs: 6, learning_rate: 2e-4, batch_size: 8, max_length: 32, evaluations: 2}}
fold: {{steps: 8}}
verify: {{rows: 8, quantized_top1: 0.7}}
export: {{budget: {{max_worse: 30 points}}}}
bench: {{trials: 2}}
"""


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, reviews: list[dict[str, str]]) -> Path:
    """A folder in which `qft run recipe.yaml` was typed."""
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_encoder))
    done = type_in(folder, "qft run recipe.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def test_it_has_learnt_and_what_was_trained_is_what_ships(classified: Path, typed: Type) -> None:
    found = as_json(typed(classified, "qft run recipe.yaml --json"))
    steps = {step["stage"]: step for step in found["waterfall"]}
    assert list(steps) == ["base", "tuned", "merged", "exported", "rounded", "folded", "shipped"]
    assert steps["tuned"]["value"] >= steps["base"]["value"] + 8
    assert steps["merged"]["loss"] == pytest.approx(steps["tuned"]["loss"], abs=1e-3)
    assert steps["exported"]["loss"] == pytest.approx(steps["merged"]["loss"], abs=1e-4)
    assert abs(steps["shipped"]["loss"] - steps["folded"]["loss"]) < 0.05
    assert steps["shipped"]["macro_f1_percent"] > 60


def test_the_bundle_says_which_labels_and_how_far_to_trust_it(classified: Path) -> None:
    manifest = json.loads((classified / INT4 / "qft.json").read_text())
    config = json.loads((classified / INT4 / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert manifest["quality"]["calibration_error_percent"] >= 0
    bundle = Bundle.load(classified / INT4)
    assert bundle.classifies
    (decision,) = bundle.classify(["I loved every minute in town"], bundle.runner())
    assert decision.text in ("positive", "negative")
    assert 0.5 <= decision.probability <= 1


def test_optimum_gives_the_same_logits_and_agrees_with_the_golden_cases(classified: Path) -> None:
    import torch

    bundle = Bundle.load(classified / INT4)
    model = opened(bundle)
    ids = bundle.tokenizer.encode("dull and slow at home", add_special_tokens=True)
    theirs = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64)).logits
    np.testing.assert_allclose(theirs.numpy(), bundle.runner().logits([ids], 1)[:, 0], atol=1e-5)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    agreement = golden_agreement(bundle)
    assert agreement.agrees, agreement


def test_predict_eval_check_and_report(classified: Path, typed: Type) -> None:
    lines = ["dull and slow at home", "great acting last night"]
    found = as_json(typed(classified, "qft predict --json", stdin="\n".join(lines)))["answers"]
    assert len(found) == 2
    assert {answer["text"] for answer in found} <= {"positive", "negative"}
    assert typed(classified, "qft predict", stdin="\n".join(lines)).stdout.count("\n") == 2
    wrote = as_json(typed(classified, "qft predict --rows reviews.jsonl --out said.jsonl --json"))
    rows = [json.loads(line) for line in (classified / "said.jsonl").read_text().splitlines()]
    assert wrote == {"out": "said.jsonl", "rows": len(rows)}
    said = {row["text"]: row["predicted"] for row in rows}
    assert [{"input": line, **said[line]} for line in lines] == found
    manifest = json.loads((classified / INT4 / "qft.json").read_text())
    again = as_json(typed(classified, "qft eval --json"))["quality"]
    assert again["loss"] == pytest.approx(manifest["quality"]["loss"], abs=1e-6)
    assert as_json(typed(classified, "qft check --json"))["agrees"]
    page = (classified / RUN / "report.html").read_text()
    for words in ("positive", "negative", "calibration error", "macro F1"):
        assert words in page


def test_plan_shows_the_label(classified: Path, typed: Type) -> None:
    for row in as_json(typed(classified, "qft plan recipe.yaml --json"))["rows"]:
        assert [run["text"] for run in row["runs"] if run["in_loss"]] in (["positive"], ["negative"])


def test_rows_may_have_several_labels(classified: Path, typed: Type, reviews: list[dict[str, str]]) -> None:
    def tags(row: dict[str, str]) -> list[str]:
        return [row["label"], *(["acting"] if "acting" in row["text"] else [])]

    text = "".join(json.dumps({"text": row["text"], "label": tags(row)}) + "\n" for row in reviews)
    (classified / "tags.jsonl").write_text(text)
    found = as_json(
        typed(
            classified,
            "qft tune recipe.yaml name=tags data.train=tags.jsonl classification.class_weights=balanced --json",
        )
    )
    steps = {step["stage"]: step for step in found["waterfall"]}
    assert steps["tuned"]["metric"] == "macro_f1"
    assert steps["tuned"]["value"] > steps["base"]["value"] + 8


@pytest.mark.parametrize("method", ["full", "head"])
def test_other_ways_of_tuning_ship_too(classified: Path, typed: Type, method: str) -> None:
    line = f"qft run recipe.yaml name={method} tuning.method={method} quantization.base=none --json"
    steps = {step["stage"]: step for step in as_json(typed(classified, line))["waterfall"]}
    assert steps["tuned"]["value"] >= steps["base"]["value"] + 8
    assert steps["merged"]["loss"] == pytest.approx(steps["tuned"]["loss"], abs=1e-4)
    assert abs(steps["shipped"]["loss"] - steps["tuned"]["loss"]) < 0.1


def test_what_a_classifier_cannot_do_is_said(classified: Path, typed: Type) -> None:
    for line, words in (
        ("data.system=Judge. name=a", "data.system"),
        ("evaluation.metric=perplexity name=b", "evaluation.metric"),
        ("tuning.method=full name=c", "write quantization.base: none"),
        ("lora.init_lora_weights=pissa name=d", "write quantization.base: none"),
    ):
        done = typed(classified, f"qft tune recipe.yaml {line}")
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_the_report_shows_which_words_carried_an_error_as_the_shipped_bundle_says(classified: Path) -> None:
    """The figures are those of asking the bundle about the text without each word."""
    bundle = Bundle.load(classified / INT4)
    runner, text = bundle.runner(), "dull and slow  at home"
    (whole,) = bundle.classify([text], runner)
    found = what_carried(bundle, runner, text, answer=whole.text, expected="?")
    assert found.probability == pytest.approx(whole.probability)
    assert "".join(word.text for word in found.words) == text
    assert [word.text.strip() for word in found.words] == text.split()
    for word, without in zip(
        found.words, ("and slow  at home", "dull slow  at home", "dull and at home", "dull and slow  home", "dull and slow  at "),
        strict=True,
    ):  # fmt: skip
        (left,) = bundle.classify([without], runner)
        same = left.probability if left.text == whole.text else 1 - left.probability  # there are two labels
        assert word.fall == pytest.approx(whole.probability - same, abs=1e-6)
    short = what_carried(bundle, runner, text, answer=whole.text, expected="?", most_words=2)
    assert [word.text for word in short.words] == ["dull ", "and ", "…"]


def test_words_of_scripts_without_spaces_are_characters(classified: Path) -> None:
    bundle = Bundle.load(classified / INT4)
    found = what_carried(bundle, bundle.runner(), "很好 really", answer="positive", expected="negative")
    assert [word.text for word in found.words] == ["很", "好 ", "really"]


def test_the_report_holds_slices_hard_rows_and_advice(classified: Path, typed: Type) -> None:
    found = as_json(typed(classified, f"qft report {RUN} --json"))
    by_label = [one for one in found["slices"] if one["by"] == "label"]
    assert sum(one["rows"] for one in by_label) == 24
    right = sum(one["metric"] * one["rows"] for one in by_label) / 24
    assert right == pytest.approx(found["waterfall"][-1]["accuracy_percent"])
    page = (classified / RUN / "report.html").read_text()
    for words in ("Which words carried", "Where it is better and worse", "Rows it finds hardest", "What to try next",
                  "Test on more rows", "qft export --app web"):  # fmt: skip
        assert words in page


def test_a_column_that_no_row_has_is_named_and_the_others_are_given(classified: Path, typed: Type) -> None:
    done = typed(classified, "qft report recipe.yaml report.slices=[stars]")
    assert done.returncode == 2
    assert "report.slices: no row has a column 'stars'" in done.stderr
    assert "label" in done.stderr
    found = as_json(typed(classified, "qft report recipe.yaml report.slices=[text] --json"))
    assert {one["by"] for one in found["slices"]} == {"length", "label"}  # every text is another: no slice of five rows
    assert (
        typed(classified, "qft report recipe.yaml").returncode == 0
    )  # the run is the recipe's again, without the override


def test_quality_is_given_by_a_column_as_long_as_the_rows_are_those_of_the_run(classified: Path, typed: Type) -> None:
    rows = [json.loads(line) for line in (classified / "reviews.jsonl").read_text().splitlines()]
    marked = [row | {"shop": "north" if n % 3 else "south"} for n, row in enumerate(rows)]
    text = "".join(json.dumps(row) + "\n" for row in marked)
    (classified / "shops.jsonl").write_text(text)
    line = "name=shops data.train=shops.jsonl report.slices=[shop] fold.steps=0"
    assert typed(classified, f"qft quantize recipe.yaml {line}").returncode == 0
    found = as_json(typed(classified, f"qft report recipe.yaml {line} --json"))
    shops = {one["value"]: one["rows"] for one in found["slices"] if one["by"] == "shop"}
    assert set(shops) <= {"north", "south"}
    assert sum(shops.values()) == 24
    (classified / "shops.jsonl").write_text(text + text)
    done = typed(classified, f"qft report recipe.yaml {line}")
    assert done.returncode == 2
    assert "shops.jsonl has changed since the run" in done.stderr
    (classified / "shops.jsonl").write_text(text)


def test_runs_are_compared_on_the_same_rows_and_not_on_others(classified: Path, typed: Type) -> None:
    for line in (
        "qft tune recipe.yaml name=longer training.epochs=9",
        "qft tune recipe.yaml name=elsewhere data.seed=1",
    ):
        assert typed(classified, line).returncode == 0
    found = as_json(typed(classified, "qft compare recipe longer --json --html page.html"))
    assert found["runs"] == ["recipe", "longer"]
    assert found["recipes"] == {"training.epochs": [6, 9]}
    assert found["same_rows"]
    base, tuned = (found["stages"][stage] for stage in ("base", "tuned"))
    assert base[1]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert tuned[0]["difference"] is None
    apart = tuned[1]["difference"]
    assert apart["value"] == pytest.approx(tuned[1]["value"] - tuned[0]["value"])
    assert apart["low"] <= apart["value"] <= apart["high"]
    page = (classified / "page.html").read_text()
    assert "training.epochs" in page
    assert "paired bootstrap" in page
    done = typed(classified, "qft compare recipe elsewhere")
    assert "not measured on the same held-out rows" in done.stdout
    assert "data.seed" in done.stdout
    assert "*" not in done.stdout
    done = typed(classified, "qft compare recipe")
    assert done.returncode == 2
    assert "which runs?" in done.stderr
