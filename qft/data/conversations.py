"""Conversations: turns, tools and calls as rows hold them, and as text for models whose chat template has no place for tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qft.errors import InputError

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_TOOLS = (
    "You may call these functions:\n{tools}\nTo call one, answer with its name and arguments alone, as\n"
    '<tool_call>\n{{"name": "…", "arguments": {{…}}}}\n</tool_call>'
)

Tool = Mapping[str, Any]  # as OpenAI writes it: {"type": "function", "function": {name, description, parameters}}


@dataclass(frozen=True)
class Call:
    """A function to be called; arguments: JSON values by name."""

    name: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        said = json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False)
        return f"<tool_call>\n{said}\n</tool_call>"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. calls: those that an assistant's turn makes, after its content or without any."""

    role: str
    content: str
    calls: tuple[Call, ...] = ()

    @property
    def text(self) -> str:
        """Content and calls as text."""
        return "\n".join(filter(None, [self.content, *map(str, self.calls)]))

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it."""
        calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.calls]
        return {"role": self.role, "content": self.content} | ({"tool_calls": calls} if calls else {})


def written_out(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The same conversation in plain system, user and assistant turns.

    Tools stand at the end of the system message, one JSON object a line; a call is <tool_call> around its JSON; what tools
    gave back is a user's turn, each result in <tool_response>.
    """
    turns: list[Message] = []
    for number, message in enumerate(messages):
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if number and messages[number - 1].role == "tool":
                turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n{result}")
            else:
                turns.append(Message("user", result))
        else:
            turns.append(Message(message.role, message.text))
    if tools:
        listed = _TOOLS.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
        if turns and turns[0].role == "system":
            turns[0] = Message("system", f"{turns[0].content}\n\n{listed}".lstrip())
        else:
            turns.insert(0, Message("system", listed))
    return turns


def read_conversation(values: Mapping[str, Any], where: str) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    """Turns and tools of a row with `messages` (or `conversations`) and perhaps `tools`, each a list or its JSON text.

    Turns are OpenAI's (role, content, tool_calls) or ShareGPT's (from, value; function_call and observation). where: the
    row, for messages. Raises InputError for turns, calls or tools of another form.
    """
    turns = _json(values.get("messages") or values.get("conversations") or [], where)
    return tuple(_message(turn, where) for turn in turns), tuple(_tool(tool, where) for tool in _tools(values, where))


def _message(turn: Any, where: str) -> Message:
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if role is None:
        raise InputError("a message needs role and content", where=where, hint='as {"role": "user", "content": "…"}')
    content = turn.get("content", turn.get("value"))
    if role == "function_call":
        return Message("assistant", "", _calls(content, where))
    calls = _calls(turn["tool_calls"], where) if turn.get("tool_calls") else ()
    return Message(_ROLES.get(role, str(role)), text_of(content), calls)


def text_of(value: Any) -> str:
    """A row's value as text: nothing is empty, what is no text is JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_calls(text: str) -> tuple[Call, ...] | None:
    """The calls that an answer makes; empty if it makes none, None if it begins one that is not whole or not right JSON.

    Read are JSON objects with a name and arguments (or parameters), alone or in a list: in <tool_call> tags, or without
    them as the whole answer, as templates write them whose tags are special tokens.
    """
    if "<tool_call>" in text:
        bodies = _CALL.findall(text)
        whole = len(bodies) == text.count("<tool_call>")
    else:
        bodies, whole = [text.strip()], True
        if not re.match(r"[\[{].*\"name\"", bodies[0], re.DOTALL):
            return ()
    try:
        found = tuple(call for body in bodies for call in _calls(json.loads(body), ""))
    except (ValueError, InputError):
        return None
    return found if whole else None


def _calls(value: Any, where: str) -> tuple[Call, ...]:
    value = _json(value, where)
    return tuple(_call(one, where) for one in (value if isinstance(value, list) else [value]))


def _call(value: Any, where: str) -> Call:
    found = value.get("function", value) if isinstance(value, dict) else {}
    if isinstance(found, dict):
        arguments = _json(found.get("arguments", found.get("parameters")), where)
        if isinstance(found.get("name"), str) and isinstance(arguments, dict):
            return Call(found["name"], arguments)
    raise InputError(
        f"not a call: {text_of(value)[:80]}", where=where, hint='a call is {"name": "…", "arguments": {…}}, as JSON'
    )


def _tools(values: Mapping[str, Any], where: str) -> list[Any]:
    found = _json(values.get("tools") or [], where)
    return found if isinstance(found, list) else [found]


def _tool(value: Any, where: str) -> Tool:
    found = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise InputError(
            f"not a tool: {text_of(value)[:80]}",
            where=where,
            hint='a tool is {"name": "…", "description": "…", "parameters": {…}}, as JSON',
        )
    return {"type": "function", "function": found}


def _json(value: Any, where: str) -> Any:
    """A value that may be JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(f"not JSON: {value[:80]}", where=where, hint=str(error)) from None
