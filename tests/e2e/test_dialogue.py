"""Conversations with tools, from rows to a bundle that is asked; answers kept to labels and to a schema. As typed."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from tests.conftest import BAD, GOOD, PLACES
from tests.e2e.conftest import Type, as_json, type_in

TOOL = {"name": "note", "parameters": {"text": "string"}}
RECIPE = """\
model: {model}
data: {{train: rows.jsonl, eval: 16, validation: 8}}
training: {{epochs: 8, learning_rate: 5e-3, batch_size: 8, max_length: 320, evaluations: 1}}
evaluation: {{metric: tool_call, answers: 24, longest_answer: 96}}
fold: {{tokens: 1024, steps: 0}}
export: {{budget: {{max_worse: 100 points}}}}
verify: {{rows: 4, quantized_top1: 0.3, quantized_kl: 5.0}}
bench: {{prompt_tokens: 16, new_tokens: 4, trials: 2}}
"""
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}, "why": {"type": "string"}},
          "required": ["score", "why"], "additionalProperties": False}  # fmt: skip


def conversation(text: str, place: str) -> dict:
    call = {"name": "note", "arguments": {"text": text}}
    return {
        "conversations": [
            {"from": "human", "value": f"{text} {place}"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "{}"},
            {"from": "gpt", "value": place},
        ],
        "tools": json.dumps([TOOL]),
    }


@pytest.fixture(scope="module")
def called(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder in which a job on rows with tools was run."""
    folder = tmp_path_factory.mktemp("tools")
    rows = [conversation(text, place) for place in PLACES[:6] for text in (*GOOD, *BAD)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_model))
    for line in ("qft tune recipe.yaml", "qft export --onnx"):
        done = type_in(folder, line)
        assert done.returncode == 0, done.stderr
    return folder


def test_calls_are_measured_after_every_stage_on_the_same_answers(called: Path, typed: Type) -> None:
    steps = as_json(typed(called, "qft report --json"))["waterfall"]
    assert [step["stage"] for step in steps] == ["base", "tuned", "merged", "exported", "rounded", "folded", "shipped"]
    for step in steps:
        assert step["metric"] == "tool_call"
        assert step["value"] == step["tool_calls"]["right_percent"] <= step["tool_calls"]["valid_percent"]
        assert (step["written"], step["tool_calls"]["expected"] + step["tool_calls"]["others"]) == (24, 24)
        assert None not in (step["ended_percent"], step["f1_percent"], step["exact_match_percent"], step["perplexity"])
    assert len({step["tool_calls"]["expected"] for step in steps}) == 1
    assert steps[-1]["tool_calls"]["called_percent"] > steps[0]["tool_calls"]["called_percent"]
    answers = [
        json.loads(line) for line in (called / "runs/recipe/answers/quantize-cpu-int4.jsonl").read_text().splitlines()
    ]
    assert sum(answer["asked"] for answer in answers) == 24
    assert "answer 1" in answers[0]["where"]


def test_the_report_shows_answers_before_and_after(called: Path, typed: Type) -> None:
    assert typed(called, "qft report").returncode == 0
    text = (called / "runs/recipe/report.html").read_text()
    for words in ("untuned said", "tuned said", "24 answers were written", "right call", "&lt;tool_call&gt;"):
        assert words in text


def test_a_conversation_with_tools_is_asked_as_a_json_line(called: Path, typed: Type) -> None:
    turns = {"messages": [{"role": "user", "content": "dull and slow at home"}], "tools": [TOOL]}
    (answer,) = as_json(typed(called, "qft predict --json", stdin=json.dumps(turns)))["answers"]
    held_out = json.loads((called / "runs/recipe/data/eval.jsonl").read_text().splitlines()[0])
    from qft.bundle.manifest import Bundle

    prompt = Bundle.load(called / "runs/recipe/bundles/cpu-int4").prompt_ids(json.dumps(turns))
    assert prompt[:40] == held_out["input_ids"][:40]  # as rows were learnt: tools first
    assert answer["text"].startswith("<")  # it has learnt that a call is due, if not how to spell it
    wrong = typed(called, "qft predict", stdin=json.dumps({**turns, "tools": [{"type": "function"}]}))
    assert wrong.returncode == 2
    assert "not a tool" in wrong.stderr


def test_a_schema_is_kept_to(called: Path, typed: Type) -> None:
    (called / "schema.json").write_text(json.dumps(SCHEMA))
    found = as_json(typed(called, "qft predict --json --max-new-tokens 12 --schema schema.json", stdin="dull\nfine"))
    for answer in found["answers"]:
        assert answer["ended"]
        jsonschema.validate(json.loads(answer["text"]), SCHEMA)
    (called / "wrong.json").write_text('{"type": "objekt"}')
    for line, said in (
        ("qft predict x --schema wrong.json", "Invalid type: objekt"),
        ("qft predict x --schema rows.jsonl", "rows.jsonl is not JSON"),
        ("qft predict x --schema nowhere.json", "cannot read nowhere.json"),
        ("qft predict x --schema schema.json --labels a,b", "leave one out"),
        ("qft predict x --labels a", "nothing to choose from"),
    ):
        done = typed(called, line)
        assert done.returncode == 2
        assert said in done.stderr


def test_labels_are_chosen_from_with_their_probabilities(finished: Path, typed: Type) -> None:
    (known,) = as_json(typed(finished, "qft predict --json great-acting"))["answers"]
    assert known["text"] == max(known["probabilities"], key=known["probabilities"].get)
    assert sum(known["probabilities"].values()) == pytest.approx(1)
    (other,) = as_json(typed(finished, "qft predict --json great-acting --labels good,negative,very-bad"))["answers"]
    assert list(other["probabilities"]) == ["good", "negative", "very-bad"]
    from qft.bundle.manifest import Bundle

    bundle = Bundle.load(finished / "runs/recipe/bundles/cpu-int4")
    (free,) = bundle.answer(["great-acting"], bundle.runner(), max_new_tokens=8)
    assert free.text == known["text"]  # it says one of its labels without being kept to them
