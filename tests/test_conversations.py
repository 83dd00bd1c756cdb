"""Conversations with tools: what rows hold, what the model sees, what an answer calls."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qft.data.conversations import Call, Message, read_calls, read_conversation, written_out
from qft.data.encode import encode
from qft.data.examples import Example, Shape, to_examples
from qft.data.rows import Row
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.measure.tool_calls import count_calls, same_calls

WEATHER = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}
CALL = Call("weather", {"town": "Bonn", "days": 2})
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Will it rain?"},
        {"from": "function_call", "value": json.dumps({"name": CALL.name, "arguments": CALL.arguments})},
        {"from": "observation", "value": '{"rain": true}'},
        {"from": "gpt", "value": "Yes."},
    ],
    "tools": json.dumps([WEATHER]),
}
OPENAI = {
    "messages": [
        {"role": "user", "content": "Will it rain?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": CALL.name, "arguments": json.dumps(CALL.arguments)},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": '{"rain": true}'},
        {"role": "assistant", "content": "Yes."},
    ],
    "tools": [{"type": "function", "function": WEATHER}],
}
# With a place for tools, calls and results, in tags of its own.
NATIVE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[CALL]{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> TextTokenizer:
    return TextTokenizer.load(tiny_model)


def example(values: dict[str, Any]) -> Example:
    ((found,), _) = to_examples([Row(values, "rows:1")], Shape("auto", "text", "label", None, None, None))
    return found


def learnt(row: Example, tokenizer: TextTokenizer) -> list[str]:
    encoded = encode(row, tokenizer)
    return [tokenizer.decode(encoded.input_ids[a:b], skip_special_tokens=False) for a, b in encoded.answers]


def test_both_ways_of_writing_rows_are_one_conversation() -> None:
    one, other = (read_conversation(values, "rows:1") for values in (SHAREGPT, OPENAI))
    assert one == other
    messages, tools = one
    assert [m.role for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1].calls == (CALL,)
    assert tools == ({"type": "function", "function": WEATHER},)


def test_without_a_place_in_the_template_tools_stand_in_the_system_message(tokenizer: TextTokenizer) -> None:
    assert not tokenizer.takes_tools
    row = example(SHAREGPT)
    text = tokenizer.render(row.messages, add_generation_prompt=False, tools=row.tools)
    assert text == (
        f"<|im_start|>system\nYou may call these functions:\n{json.dumps(WEATHER)}\n"
        "To call one, answer with its name and arguments alone, as\n"
        '<tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWill it rain?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n"
        '<|im_start|>user\n<tool_response>\n{"rain": true}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert learnt(row, tokenizer) == [f"{CALL}<|im_end|>", "Yes.<|im_end|>"]


def test_a_template_with_a_place_is_given_tools_and_calls(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(NATIVE)
    native, row = TextTokenizer.load(tmp_path), example(OPENAI)
    assert native.takes_tools
    text = native.render(row.messages, add_generation_prompt=False, tools=row.tools)
    assert text.startswith(f"<|im_start|>system\n{json.dumps(WEATHER)}<|im_end|>\n")
    assert '<|im_start|>tool\n{"rain": true}<|im_end|>' in text
    assert learnt(row, native) == [f"[CALL]weather{json.dumps(CALL.arguments)}<|im_end|>", "Yes.<|im_end|>"]


def test_a_systems_words_stay_and_results_of_one_turn_are_one_turn() -> None:
    turns = [Message("system", "Be brief."), Message("user", "x"), Message("tool", "1"), Message("tool", "2")]
    system, _, results = written_out(turns, [{"type": "function", "function": WEATHER}])
    assert system.content.startswith("Be brief.\n\nYou may call")
    assert results == Message("user", "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>")


def test_other_tools_make_another_prompt() -> None:
    other = {**SHAREGPT, "tools": json.dumps([{**WEATHER, "name": "climate"}])}
    assert example(SHAREGPT).key() != example(other).key()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tools": "[{"}, "not JSON"),
        ({"tools": '[{"type": "function"}]'}, "not a tool"),
        ({"conversations": [{"from": "function_call", "value": "weather(Bonn)"}]}, "not JSON"),
        ({"conversations": [{"from": "function_call", "value": '{"name": "weather"}'}]}, "not a call"),
        ({"conversations": [{"value": "x"}]}, "role and content"),
    ],
)
def test_a_row_of_another_form_is_one_message_with_its_place(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        example({**SHAREGPT, **changes})
    assert "rows:1" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (str(CALL), (CALL,)),
        (f"One moment.\n{CALL}\n{CALL}", (CALL, CALL)),
        ('{"name": "weather", "parameters": {"town": "Bonn", "days": 2}}', (CALL,)),  # as Llama's template has it
        (f'[{{"name": "weather", "arguments": {json.dumps(CALL.arguments)}}}]', (CALL,)),  # as Mistral's
        ("It will rain.", ()),
        ('{"rain": true}', ()),
        ('Write {"name": "x"} into the file.', ()),
        ("", ()),
        (str(CALL).removesuffix("\n</tool_call>"), None),
        (str(CALL).replace("}}", "}"), None),
        (str(CALL).replace('"', "'"), None),
        ('<tool_call>\n{"name": "weather"}\n</tool_call>', None),
        ('<tool_call>\n"weather"\n</tool_call>', None),
        ('{"name": "weather", "arguments": {"town": "Bo', None),
    ],
)
def test_calls_are_read_from_whole_and_from_broken_answers(text: str, calls: tuple[Call, ...] | None) -> None:
    assert read_calls(text) == calls


def test_no_cut_of_a_call_is_taken_for_one() -> None:
    for end in range(len(str(CALL))):
        assert not read_calls(str(CALL)[:end])


def test_arguments_are_compared_as_json_values() -> None:
    def same(one: Any, other: Any) -> bool:
        return same_calls([Call("f", {"x": one})], [Call("f", {"x": other})])

    assert same(5, 5.0)
    assert same({"a": 1, "b": [2]}, {"b": [2.0], "a": 1})
    assert not same(True, 1)
    assert not same("5", 5)
    assert not same([1, 2], [2, 1])
    assert same_calls([Call("f", {}), Call("g", {})], [Call("g", {}), Call("f", {})])
    assert not same_calls([Call("f", {})], [Call("f", {}), Call("f", {})])


def test_shares_of_calls_each_lie_within_the_one_before() -> None:
    right, other, wrong = str(CALL), str(Call("weather", {})), str(Call("climate", {}))
    said = [right, other, wrong, '<tool_call>\n{"na', "It will rain."]
    words = ["Yes.", right, '<tool_call>\n{"na', "No."]
    answers = [(right, one) for one in said] + [("Yes.", one) for one in words]
    random.Random(0).shuffle(answers)
    found = count_calls(answers)
    assert found is not None
    assert (found.expected, found.others) == (5, 4)
    assert (found.called_percent, found.valid_percent) == (80, 60)
    assert (found.function_percent, found.right_percent) == (40, 20)
    assert found.false_percent == 50
    assert count_calls([("Yes.", right)]) is None
