"""What may be a call waits until the answer is whole; what is none is given out as it comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qft.bundle.generate import Writing
from qft.data.tokenizer import TextTokenizer
from qft.serve.writer import Done, Piece, answer_events

pytestmark = pytest.mark.serve
CALL = '<tool_call>\n{"name": "note", "arguments": {"count": 5}}\n</tool_call>'


@pytest.mark.parametrize(
    ("said", "text", "names"),
    [
        (CALL, "", ["note"]),
        (f"{CALL}\n{CALL}", "", ["note", "note"]),
        (f"I note it.\n{CALL}", "I note it.\n", ["note"]),
        ('{"name": "note", "arguments": {}}', "", ["note"]),
        ('{"name": "note", "argu', '{"name": "note", "argu', []),
        (CALL[:-3], CALL[:-3], []),
        ("a < b <tool", "a < b <tool", []),
        ("  plain text", "  plain text", []),
        ("", "", []),
    ],
)
def test_calls_are_told_from_text(said: str, text: str, names: list[str], tiny_model: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_model)
    events = list(answer_events(Writing((token for token in tokenizer.encode(said)), tokenizer), calls=True))
    done = events[-1]
    assert isinstance(done, Done)
    assert "".join(event.text for event in events if isinstance(event, Piece)) == text
    assert [call.name for call in done.calls] == names
    assert done.reason == ("tool_calls" if names else "length")


def test_text_is_not_held_back_where_no_call_begins(tiny_model: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_model)
    events = list(
        answer_events(Writing((token for token in tokenizer.encode("a fine film at home")), tokenizer), calls=True)
    )
    assert sum(isinstance(event, Piece) and bool(event.text) for event in events) > 3
