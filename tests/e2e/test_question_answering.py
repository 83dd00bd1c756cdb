"""A reader's whole path: an encoder with a new head over places becomes a bundle that finds answers without torch."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from qft.bundle.manifest import Bundle
from qft.data.passages import Passage
from qft.data.windows import cut_windows, text_numbers
from tests.conftest import BAD, GOOD, PLACES
from tests.e2e.conftest import Type, as_json, type_in
from tests.e2e.optimum import golden_agreement, opened

RUN = "runs/recipe"
INT4 = f"{RUN}/bundles/cpu-int4"
RECIPE = """\
model: {model}
task: question-answering
quantization: {{compute_dtype: float32}} # random layers tell texts apart by little: bfloat16's rounding would show
data: {{train: questions.jsonl, eval: 24, validation: 24}}
question_answering: {{stride: 6, longest_answer: 4}}
training: {{epochs: 8, learning_rate: 5e-3, batch_size: 8, max_length: 24, evaluations: 2}}
fold: {{steps: 8}}
verify: {{rows: 8, quantized_top1: 0.7}}
export: {{budget: {{max_worse: 30 points}}}}
bench: {{trials: 2}}
"""


def questions() -> list[dict]:
    """Contexts of a few reviews, one of which names a place: the answer; every seventh names none."""
    chance, rows = random.Random(0), []
    for number in range(140):
        reviews = chance.sample([*GOOD, *BAD], 4)
        place = "" if number % 7 == 0 else chance.choice(PLACES)
        reviews[chance.randrange(4)] += f" {place}"
        context = " and ".join(reviews)
        answer = (
            {"text": [place], "answer_start": [context.index(place)]} if place else {"text": [], "answer_start": []}
        )
        rows.append({"question": "I loved acting", "context": context, "answers": answer})
    return rows


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A folder in which `qft run recipe.yaml` was typed."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions()))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_encoder))
    done = type_in(folder, "qft run recipe.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def test_it_has_learnt_and_what_was_trained_is_what_ships(reading: Path, typed: Type) -> None:
    found = as_json(typed(reading, "qft run recipe.yaml --json"))
    steps = {step["stage"]: step for step in found["waterfall"]}
    assert list(steps) == ["base", "tuned", "merged", "exported", "rounded", "folded", "shipped"]
    assert {step["metric"] for step in steps.values()} == {"f1"}
    assert steps["tuned"]["value"] >= steps["base"]["value"] + 30
    assert steps["tuned"]["exact_match_percent"] <= steps["tuned"]["f1_percent"]
    assert steps["merged"]["loss"] == pytest.approx(steps["tuned"]["loss"], abs=1e-3)
    assert steps["exported"]["loss"] == pytest.approx(steps["merged"]["loss"], abs=1e-4)
    assert abs(steps["shipped"]["loss"] - steps["folded"]["loss"]) < 0.1
    assert found["labels"] is None
    assert found["data"]["labels"] == {"answered": 120, "no answer": 20}


def test_a_passage_is_never_on_both_sides(reading: Path) -> None:
    parts = {
        part: [json.loads(line) for line in (reading / RUN / f"data/{part}.jsonl").read_text().splitlines()]
        for part in ("train", "validation", "eval")
    }
    assert max(row["number"] for row in parts["eval"]) > 0  # some contexts take two windows
    places = [{row["where"] for row in rows} for rows in parts.values()]
    assert sum(map(len, places)) == len(set.union(*places)) == 140


def test_optimum_gives_the_same_logits_and_agrees_with_the_golden_cases(reading: Path) -> None:
    import torch

    bundle = Bundle.load(reading / INT4)
    model = opened(bundle)
    pair = bundle.tokenizer.encode_pair("I loved acting", "dull and slow at home").input_ids
    numbers = torch.tensor([text_numbers(pair, bundle.tokenizer.pair_mark)])
    assert numbers.any()
    out = model(
        input_ids=torch.tensor([pair]),
        attention_mask=torch.ones(1, len(pair), dtype=torch.int64),
        token_type_ids=numbers,
    )
    theirs = torch.stack([out.start_logits, out.end_logits], 1).numpy()
    np.testing.assert_allclose(theirs, bundle.runner().logits([pair], 2), atol=1e-5)
    agreement = golden_agreement(bundle)
    assert agreement.agrees, agreement


def test_predict_finds_the_place_in_the_context(reading: Path, typed: Type) -> None:
    rows = [row for row in questions() if row["answers"]["text"]][:20]
    lines = "\n".join(json.dumps({"question": row["question"], "context": row["context"]}) for row in rows)
    found = as_json(typed(reading, "qft predict --json", stdin=lines))["answers"]
    for answer, row in zip(found, rows, strict=True):
        if answer["begin"] is not None:
            assert answer["text"] == row["context"][answer["begin"] : answer["end"]]
        assert 0 < answer["probability"] <= 1
    right = sum(answer["text"] == row["answers"]["text"][0] for answer, row in zip(found, rows, strict=True))
    assert right >= 10
    assert typed(reading, "qft predict", stdin=lines).stdout.count("\n") == 20
    (reading / "asked.jsonl").write_text(lines)
    typed(reading, "qft predict --rows asked.jsonl --out found.jsonl")
    written = [json.loads(line) for line in (reading / "found.jsonl").read_text("utf-8").splitlines()]
    assert [{"input": line, **row["predicted"]} for line, row in zip(lines.splitlines(), written, strict=True)] == found
    plain = typed(reading, "qft predict", stdin="Where was it?")
    assert plain.returncode == 2
    assert '{"question": "…", "context": "…"}' in plain.stderr


def test_a_long_context_is_read_in_windows(reading: Path) -> None:
    bundle = Bundle.load(reading / INT4)
    filler = " and ".join([*GOOD, *BAD] * 6)
    context = f"{filler} and a fine film on the train and {filler}"
    windows, _ = cut_windows(Passage("I loved acting", context, (), ()), "", bundle.tokenizer, max_length=24, stride=6)
    assert len(windows) > 10
    found = bundle.find("I loved acting", context, bundle.runner())
    assert (found.text, found.begin) == ("on the train", context.index("on the train"))


def test_eval_check_and_report(reading: Path, typed: Type) -> None:
    manifest = json.loads((reading / INT4 / "qft.json").read_text())
    assert manifest["ort_class"] == "ORTModelForQuestionAnswering"
    assert manifest["keys"] == {"stride": 6, "longest_answer": 4, "no_answer_margin": 0.0}
    found = as_json(typed(reading, "qft eval --json"))
    assert found["quality"]["loss"] == pytest.approx(manifest["quality"]["loss"], abs=1e-6)
    assert len(found["answers"]) == found["quality"]["rows"]
    assert as_json(typed(reading, f"qft eval --rows questions.jsonl --bundle {INT4} --json"))["quality"]["rows"] == 140
    assert as_json(typed(reading, "qft check --json"))["agrees"]
    page = (reading / RUN / "report.html").read_text()
    for words in ("exact match", "F1", "no answer", next(a["expected"] for a in found["answers"] if a["right"])):
        assert words in page


def test_plan_shows_the_answer(reading: Path, typed: Type) -> None:
    found = as_json(typed(reading, "qft plan recipe.yaml --json"))
    assert found["warnings"] == []
    for row in found["rows"]:
        (marked,) = [run["text"] for run in row["runs"] if run["in_loss"]]
        assert marked in (*PLACES, "(no answer here)")


def test_plan_warns_of_a_language_that_the_tokenizer_does_not_know(reading: Path, typed: Type) -> None:
    rows = [{"question": "Где это?", "context": f"Это было в городе {n}", "answer": "в городе"} for n in range(100)]
    (reading / "foreign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "qft plan recipe.yaml data.train=foreign.jsonl name=foreign"
    (warning,) = as_json(typed(reading, f"{line} --json"))["warnings"]
    assert "% of the tokens are unknown" in warning
    assert warning[:60] in typed(reading, line).stdout


def test_what_a_reader_cannot_do_is_said(reading: Path, typed: Type) -> None:
    for line, words in (
        ("data.system=Judge. name=a", "data.system"),
        ("evaluation.metric=accuracy name=b", "evaluation.metric"),
        ("data.format=text data.text_column=context name=c", "no context"),
    ):
        done = typed(reading, f"qft tune recipe.yaml {line}")
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
