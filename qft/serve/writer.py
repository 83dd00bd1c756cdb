"""A language model's answers to what clients ask, as events: begun, pieces of text, done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qft.bundle.constrained import Schema
from qft.bundle.feed import READ_AT_ONCE, Batch, Feed
from qft.bundle.generate import Writing, begun
from qft.bundle.manifest import Bundle
from qft.bundle.sampling import Sampler
from qft.bundle.session import OnnxRunner
from qft.data.conversations import Call, Message, Tool, read_calls, read_conversation
from qft.serve.errors import ApiError
from qft.serve.forms import ChatAsked, CompletionAsked
from qft.serve.metrics import Metrics

_CALL = "<tool_call>"
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Begun:
    """The question is understood; the answer begins."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """Some more of the text, or none."""

    text: str


@dataclass(frozen=True)
class Done:
    """reason: as OpenAI's finish_reason says it."""

    reason: str
    tokens: int
    calls: tuple[Call, ...] = ()


Event = Begun | Piece | Done


class Writer:
    """Answers for as many clients as there are feeds; each goes on from the feed that has read the most of its prompt."""

    def __init__(self, bundle: Bundle, runner: OnnxRunner, *, at_once: int, most_tokens: int, metrics: Metrics) -> None:
        self._bundle, self._tokenizer, self._metrics = bundle, bundle.tokenizer, metrics
        self._most = most_tokens
        batch = Batch(runner)
        self._idle = [Feed(runner, batch) for _ in range(at_once)]

    def chat(self, asked: ChatAsked) -> Iterator[Event]:
        """The next turn of a conversation. Raises ApiError or InputError, before anything else, if it cannot be given."""
        messages, tools = self._conversation(asked)
        wanted = asked.response_format.schema_wanted
        forced = _forced(asked, tools)
        if tools and wanted is not None:
            raise ApiError(400, "an answer is a call or of a format; leave out tools or response_format", param="tools")
        ids = self._bundle.conversation_ids(messages, tools)
        if forced is not None and self._tags_calls(tools):
            ids += self._tokenizer.encode(f"{_CALL}\n")
        most = self._limit(len(ids), asked.max_completion_tokens or asked.max_tokens, usual=self._most)
        yield from self._answer(ids, asked, most, wanted if forced is None else forced, calls=bool(tools))

    def complete(self, asked: CompletionAsked) -> Iterator[Event]:
        """What follows a text, as it stands: no template is put around it."""
        ids = self._tokenizer.encode(asked.text, add_special_tokens=True)
        if not ids:
            raise ApiError(400, "prompt is empty", param="prompt")
        most = self._limit(len(ids), asked.max_tokens, usual=16)  # OpenAI's
        yield from self._answer(ids, asked, most, asked.response_format.schema_wanted, calls=False)

    def _conversation(self, asked: ChatAsked) -> tuple[Sequence[Message], Sequence[Tool]]:
        """The user's turns in the recipe's prompt, as they were learnt."""
        turns = [_plain(turn, f"messages[{number}]") for number, turn in enumerate(asked.messages)]
        tools = [] if asked.tool_choice == "none" else asked.tools
        messages, tools_read = read_conversation({"messages": turns, "tools": tools}, "messages")
        alone = len(messages) == 1 and messages[0].role == "user" and not tools_read
        if not self._tokenizer.has_chat_template and not alone:
            raise ApiError(
                400,
                "this bundle's model has no chat template: send one user message alone, or ask /v1/completions",
                param="messages",
            )
        wrap = self._bundle.content
        return [Message("user", wrap(m.content)) if m.role == "user" else m for m in messages], tools_read

    def _tags_calls(self, tools: Sequence[Tool]) -> bool:
        turns = [Message("user", "x"), Message("assistant", "", (Call("qftcall", {}),))]
        answer = self._tokenizer.render(turns, add_generation_prompt=False, tools=tools).partition("qftcall")[0]
        return answer.rfind(_CALL) > answer.rfind("</tool_call>")

    def _answer(
        self, ids: list[int], asked: ChatAsked | CompletionAsked, most: int, schema: Any, *, calls: bool
    ) -> Iterator[Event]:
        began, sampler = time.monotonic(), Sampler(asked.sampling)
        kept = None if schema is None else Schema(schema, self._tokenizer)
        yield Begun(len(ids))
        feed = max(self._idle, key=lambda one: one.known(ids))
        self._idle.remove(feed)
        writing = self._bundle.writing(feed, ids, sampler, max_new_tokens=most, schema=kept, stop=asked.stops)
        try:
            if len(ids) > READ_AT_ONCE:
                for _ in feed.read(ids[:-1]):  # a long prompt is read in turns too
                    yield Piece("")
            for number, event in enumerate(answer_events(writing, calls=calls)):
                if not number:
                    self._metrics.first_piece.observe(time.monotonic() - began)
                yield event
        finally:
            self._idle.append(feed)
            self._metrics.tokens.labels("prompt").inc(len(ids))
            self._metrics.tokens.labels("answer").inc(writing.count)

    def _limit(self, prompt: int, asked: int | None, *, usual: int) -> int:
        """How many tokens the answer may have."""
        if asked is not None and asked > self._most:
            raise ApiError(400, f"this server writes at most {self._most} tokens an answer", param="max_tokens")
        room = self._bundle.longest - prompt
        if room < (asked or 1):
            raise ApiError(
                400,
                f"{prompt} tokens and an answer of {asked or 1} are more than the model's {self._bundle.longest}",
                param="messages" if asked is None else "max_tokens",
                code="context_length_exceeded",
            )
        return asked or min(usual, self._most, room)


def answer_events(writing: Writing, *, calls: bool) -> Iterator[Event]:
    """calls: what may be one waits until the answer is whole."""
    out, mark = 0, _CALL if calls else ""
    for piece in writing:
        if not calls:
            yield Piece(piece)
            continue
        text = writing.text
        sure = len(text) - begun(text, mark) if (place := text.find(mark)) < 0 else place
        sure = 0 if text.lstrip()[:1] in ("{", "[", "") else sure
        yield Piece(text[out:sure])
        out = max(out, sure)
    rest = writing.text[out:] if calls else ""
    if calls and (found := read_calls(rest)):
        yield Done("tool_calls", writing.count, found)
        return
    yield Piece(rest)
    yield Done("stop" if writing.ended else "length", writing.count)


def _plain(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with its content as text. Raises ApiError for pictures and the like, and roles that there are not."""
    role, content = turn.get("role"), turn.get("content")
    role = "system" if role == "developer" else role
    if role not in _ROLES:
        raise ApiError(400, f"no role {role!r}; there are {', '.join(_ROLES)}", param=where)
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ApiError(400, "only text is read: a content's parts are {type: text, text: …}", param=where)
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ApiError(400, "content is neither text nor a list of parts", param=where)
    if content is None and not turn.get("tool_calls"):
        raise ApiError(400, "a message needs content", param=where)
    return {"role": role, "content": content or "", "tool_calls": turn.get("tool_calls")}


def _forced(asked: ChatAsked, tools: Sequence[Tool]) -> Any:
    """The schema of a call that must be made; None if none must."""
    if asked.tool_choice in ("none", "auto"):
        return None
    name = None
    if isinstance(asked.tool_choice, dict):
        name = (asked.tool_choice.get("function") or {}).get("name")
    allowed = [
        tool["function"] for tool in tools if asked.tool_choice == "required" or tool["function"]["name"] == name
    ]
    if not allowed:
        raise ApiError(400, "tool_choice asks for a function that is not among tools", param="tool_choice")
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": one["name"]}, "arguments": _parameters(one)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for one in allowed
        ]
    }


def _parameters(function: Any) -> Any:
    found = function.get("parameters")
    return found if isinstance(found, dict) and "type" in found else {"type": "object"}
