"""What clients get, in OpenAI's shapes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from qft.data.conversations import Call


class Shape:
    """One answer's bodies. chat: of /v1/chat/completions, else of /v1/completions."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat = chat
        self._kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, reason: str, calls: Sequence[Call], usage: dict[str, int]) -> dict[str, Any]:
        """The answer as one body."""
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            said: dict[str, Any] = {"message": message | ({"tool_calls": _calls(calls)} if calls else {})}
        else:
            said = {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._kind, "choices": [choice], "usage": usage}

    def first(self) -> str:
        """What opens a stream of a conversation."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}) if self._chat else ""

    def piece(self, text: str) -> str:
        """Some more of the text."""
        return self._chunk({"delta": {"content": text}} if self._chat else {"text": text})

    def last(self, reason: str, calls: Sequence[Call]) -> str:
        """The calls, if there are any, and why the answer ends."""
        numbered = [{"index": number, **call} for number, call in enumerate(_calls(calls))]
        called = self._chunk({"delta": {"tool_calls": numbered}}) if calls else ""
        return called + self._chunk({"delta": {}} if self._chat else {"text": ""}, reason)

    def used(self, usage: dict[str, int]) -> str:
        """How many tokens were read and written."""
        return event(self._chunk_head() | {"choices": [], "usage": usage})

    def _chunk(self, said: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return event(self._chunk_head() | {"choices": [choice]})

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": f"{self._kind}.chunk" if self._chat else self._kind}


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(body: Any) -> str:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n"


def _calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]
