"""What a line of input asks: a text, a conversation, a question with its context."""

from __future__ import annotations

import json

from qft.data.conversations import Message, Tool, read_conversation
from qft.errors import InputError


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
