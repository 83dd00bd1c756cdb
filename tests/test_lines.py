"""Rows of a file are asked in the form that a bundle's task has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qft.bundle.lines import conversation_of, lines_of, question_of
from qft.data.rows import Row
from qft.errors import InputError

WRITES: dict[str, Any] = {"task": "text-generation", "prompt": None, "column": "text"}


def asked(values: dict[str, Any], manifest: dict[str, Any] = WRITES, **how: Any) -> str:
    (line,) = lines_of([Row(values, "rows.jsonl:1")], manifest, Path(), **how)
    return line


@pytest.mark.parametrize(
    ("values", "manifest", "line"),
    [
        ({"id": 7, "text": "dull"}, WRITES, "dull"),
        ({"id": 7, "message": "dull", "text": "no"}, WRITES | {"column": "message"}, "dull"),
        ({"question": "why?", "answer": "so"}, WRITES, "why?"),  # no column of the recipe's: one whose name says it
        ({"instruction": "Sort.", "input": "b a", "output": "a b"}, WRITES, "Sort.\n\nb a"),
        ({"title": "A", "body": "b"}, WRITES | {"prompt": "{title}: {body}"}, "A: b"),
        ({"text": 3.5}, WRITES, "3.5"),
        ({"translation": {"en": "a dog", "de": "ein Hund"}}, {"task": "translation", "column": "en"}, "a dog"),
        ({"translation": {"en": "a dog"}, "source": "opus"}, {"task": "translation", "column": "en"}, "a dog"),
        ({"text": "dull"}, {"task": "text-classification"}, "dull"),  # a bundle that an older qft made
    ],
)
def test_a_row_asks_what_its_column_holds(values: dict[str, Any], manifest: dict[str, Any], line: str) -> None:
    assert asked(values, manifest) == line


def test_a_column_can_be_named_and_one_that_is_not_there_is_told() -> None:
    assert asked({"text": "dull", "note": "fine"}, column="note") == "fine"
    with pytest.raises(InputError, match="no column 'nota'; there are text, note") as told:
        asked({"text": "dull", "note": "fine"}, column="nota")
    assert "did you mean 'note'?" in str(told.value)
    with pytest.raises(InputError, match="no column 'text'; there are body") as told:
        asked({"body": "dull"})
    assert "--column" in str(told.value)


def test_a_question_takes_its_context_along() -> None:
    line = asked({"question": "Where?", "context": "In {town}.", "answers": []}, {"task": "question-answering"})
    assert question_of(line) == ("Where?", "In {town}.")


def test_a_conversation_is_asked_up_to_its_last_question() -> None:
    tool = {"type": "function", "function": {"name": "rain", "parameters": {}}}
    turns = [("user", "Will it rain?"), ("assistant", "Where?"), ("user", "At home.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"messages": [*messages, {"role": "assistant", "content": "No."}], "tools": json.dumps([tool])}
    found, tools = conversation_of(asked(row))
    assert [(message.role, message.content) for message in found] == turns
    assert [dict(one) for one in tools] == [tool]
    shared = {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
    assert [message.content for message in conversation_of(asked(shared))[0]] == ["Hi."]
    evals = {"input": [{"role": "system", "content": "Judge."}, {"role": "user", "content": "dull"}], "ideal": "bad"}
    assert [message.content for message in conversation_of(asked(evals))[0]] == ["Judge.", "dull"]
    with pytest.raises(InputError, match="nothing is asked"):
        asked({"messages": [{"role": "assistant", "content": "Hello."}]})


def test_a_sound_file_lies_beside_the_rows(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"")
    hears = {"task": "automatic-speech-recognition", "column": "audio"}
    rows = [Row({"audio": name, "text": "one"}, f"rows.csv:{n}") for n, name in enumerate(("a.wav", "b.wav"), 2)]
    assert lines_of(rows[:1], hears, tmp_path) == [str(tmp_path / "a.wav")]
    with pytest.raises(InputError, match=r"rows\.csv:3.*no sound file"):
        lines_of(rows, hears, tmp_path)
