"""What a line of input asks: a text, a conversation, a question with its context; and the lines that rows of a file are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qft.data.audio import find_clip
from qft.data.conversations import Message, Tool, read_conversation, text_of
from qft.data.examples import around_place, column_of, fill
from qft.data.rows import Row
from qft.errors import InputError

_ASKED = ("text", "prompt", "question", "instruction", "input", "query", "anchor", "source", "audio")


def conversation_of(line: str) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    """Messages and tools of a JSON line that holds any; nothing of a text."""
    try:
        asked = json.loads(line) if line.lstrip().startswith("{") else None
    except ValueError:
        return (), ()
    if not isinstance(asked, dict) or "messages" not in asked:
        return (), ()
    return read_conversation(asked, "the line")


def question_of(line: str) -> tuple[str, str]:
    """Question and context of a JSON line. Raises InputError if it holds something else."""
    try:
        asked = json.loads(line)
        question, context = asked["question"], asked["context"]
    except (ValueError, TypeError, KeyError):
        question = context = None
    if not isinstance(question, str) or not isinstance(context, str):
        raise InputError(
            f"not a question with its context: {line[:60]}",
            hint='a line is {"question": "…", "context": "…"}, as JSON',
        )
    return question, context


def lines_of(rows: Sequence[Row], manifest: Mapping[str, Any], home: Path, column: str | None = None) -> list[str]:
    """The line that asks what each row does, in the form that a bundle's task has.

    column: that holds the text or the sound file; None: the recipe's, or one whose name says it. home: where paths of sound files
    start. Raises InputError for a row without that column, a sound file that is not there, a conversation without a question.
    """
    rows = [_unwrapped(row) for row in rows]
    known = [name for name in (manifest.get("column"), *_ASKED) if name in rows[0].values]
    column = column or next(iter(known), manifest.get("column") or _ASKED[0])
    return [_line_of(row, manifest, home, column) for row in rows]


def _unwrapped(row: Row) -> Row:
    """Sets of translations on the hub keep both sides in a column of their own."""
    inner = row.values.get("translation")
    return Row(inner, row.where) if isinstance(inner, dict) else row


def _line_of(row: Row, manifest: Mapping[str, Any], home: Path, column: str) -> str:
    values, task, prompt = row.values, manifest["task"], manifest.get("prompt")
    if task == "question-answering":
        return _json({name: text_of(column_of(row, name, "the first line")) for name in ("question", "context")})
    if task == "text-generation" and (values.get("messages") or values.get("conversations")):
        return _unanswered(row)
    if task == "text-generation" and {"input", "ideal"} <= set(values):  # as OpenAI's evals keep them
        return _unanswered(Row({"messages": values["input"]}, row.where))
    if prompt and around_place(prompt) is None:  # of several columns
        return fill(prompt, row)
    text = text_of(column_of(row, column, "--column"))
    if task == "automatic-speech-recognition":
        return find_clip([home], text, row.where).path
    return f"{text}\n\n{extra}" if column == "instruction" and (extra := text_of(values.get("input"))) else text


def _unanswered(row: Row) -> str:
    """A conversation up to its last question: rows that were learnt from end in the answer."""
    found, tools = read_conversation(row.values, row.where)
    messages = list(found)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not any(message.role == "user" for message in messages):
        raise InputError("nothing is asked", where=row.where, hint="a conversation needs a user's turn to be answered")
    return _json({"messages": [message.as_dict() for message in messages], "tools": list(tools)})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
