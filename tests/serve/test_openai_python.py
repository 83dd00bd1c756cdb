"""The real openai client for Python against a real server."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import openai
import pytest

from qft.bundle.feed import READ_AT_ONCE
from qft.bundle.manifest import Bundle
from tests.serve.conftest import Served

pytestmark = pytest.mark.serve
ASKED = [{"role": "user", "content": "a fine film at home"}]
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}, "why": {"type": "string"}},
          "required": ["score", "why"], "additionalProperties": False}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "…", "parameters": {
        "type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"], "additionalProperties": False}}}
    for name in ("note", "forget")
]  # fmt: skip


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_openai_python_lists_the_one_model(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


def test_openai_python_chats_as_the_bundle_answers(client: openai.OpenAI, text_bundle: Path) -> None:
    bundle = Bundle.load(text_bundle)
    (expected,) = bundle.answer([ASKED[0]["content"]], bundle.runner(), max_new_tokens=16)
    found = client.chat.completions.create(model="tiny", messages=ASKED, max_completion_tokens=16)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == ("stop" if expected.ended else "length")
    assert found.usage
    assert found.usage.completion_tokens == expected.tokens
    assert found.usage.prompt_tokens == len(bundle.prompt_ids(ASKED[0]["content"]))
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_openai_python_streams_what_it_gets_whole(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "messages": ASKED, "max_tokens": 40, "temperature": 1.5, "seed": 4}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert {choice.finish_reason for choice in choices[:-1]} == {None}
    assert len(choices) > 4
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_openai_python_completes_a_text_without_a_template(client: openai.OpenAI, text_bundle: Path) -> None:
    bundle = Bundle.load(text_bundle)
    ids = bundle.tokenizer.encode("a fine", add_special_tokens=True)
    (expected,) = bundle.runner().generate([ids], max_new_tokens=16, stop_ids=bundle.tokenizer.stop_ids)
    found = client.completions.create(model="tiny", prompt="a fine")
    assert found.choices[0].text == bundle.tokenizer.decode(expected)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(model="tiny", prompt="a fine", stream=True)]
    assert "".join(pieces) == found.choices[0].text


def test_openai_python_seeds_make_the_same_choices_and_stop_texts_end(client: openai.OpenAI) -> None:
    def said(seed: int, **more: object) -> tuple[str, str]:
        choice = client.completions.create(
            model="tiny", prompt="a fine", max_tokens=32, temperature=2, top_p=0.99, seed=seed, **more
        ).choices[0]
        return choice.text, choice.finish_reason

    (text, _), (again, _), (other, _) = said(1), said(1), said(2)
    assert text == again != other
    word = text[4:7]
    assert said(1, stop=["nowhere in it", word]) == (text.partition(word)[0], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_openai_python_json_schema_is_kept_to(client: openai.OpenAI, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "score", "schema": SCHEMA, "strict": True}}
    options = {
        "model": "tiny",
        "messages": ASKED,
        "response_format": form,
        "max_tokens": 20,
        "temperature": 1,
        "seed": 0,
    }
    if stream:
        chunks = client.chat.completions.create(**options, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.chat.completions.create(**options).choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMA)
    free = {"type": "json_object"}
    found = client.chat.completions.create(model="tiny", messages=ASKED, response_format=free, max_tokens=5)
    assert isinstance(json.loads(found.choices[0].message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "forget"}}])
def test_openai_python_tool_calls_that_must_be_made_are_valid(client: openai.OpenAI, choice: object) -> None:
    options = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "tool_choice": choice, "max_tokens": 12}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    assert call.function.name in (("note", "forget") if choice == "required" else ("forget",))
    assert isinstance(json.loads(call.function.arguments)["count"], int)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    (streamed,) = [one for chunk in chunks for one in chunk.delta.tool_calls or ()]
    assert streamed.function.arguments == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    answered = [*ASKED, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    assert client.chat.completions.create(model="tiny", messages=answered, max_tokens=4).usage.prompt_tokens > 50


def test_openai_python_tools_that_need_not_be_called_leave_text(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, max_tokens=8).choices[0]
    assert found.message.tool_calls is None
    assert found.message.content
    pieces = client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == found.message.content


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": "gpt-4"}, "no model 'gpt-4' here, but 'tiny'"),
        ({"n": 2}, "n is not served"),
        ({"temperature": 3}, "from 0 to 2"),
        ({"max_tokens": 5000}, "at most 1024"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "more than the model's 1024"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "no role 'narrator'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "only text"),
        ({"messages": [{"role": "user", "content": "a fine film " * 600}]}, "more than the model's 1024"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}}, "objekt"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "buy"}}}, "not among tools"),
        ({"tools": [{"type": "function"}]}, "not a tool"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_openai_python_errors_are_ones_that_it_knows(
    client: openai.OpenAI, more: dict, said: str, stream: bool
) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=said) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": ASKED, "stream": stream, **more})
    assert caught.value.type == "invalid_request_error"
    assert "--" not in caught.value.message  # no word of the command line


def test_openai_python_transcription_is_not_what_a_language_model_does(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this bundle is for text-generation: ask POST /v1/chat/completions"):
        client.audio.transcriptions.create(model="tiny", file=b"RIFF")


def test_openai_python_a_long_prompt_is_read_in_turns_and_answered_the_same(
    client: openai.OpenAI, text_bundle: Path
) -> None:
    text = "a fine film last night and a waste of time " * 24
    bundle = Bundle.load(text_bundle)
    ids = bundle.prompt_ids(text)
    assert len(ids) > 2 * READ_AT_ONCE
    (expected,) = bundle.runner().generate([ids], max_new_tokens=8, stop_ids=bundle.tokenizer.stop_ids)
    found = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], max_tokens=8)
    assert found.choices[0].message.content == bundle.tokenizer.decode(expected)
