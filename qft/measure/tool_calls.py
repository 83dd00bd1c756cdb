"""How well a model calls tools: whether it calls where it should, in valid JSON, the right function with the right arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qft.data.conversations import Call, read_calls


@dataclass(frozen=True)
class ToolCalls:
    """expected: answers that should be calls; others: that should not. Shares of the expected, each within the one before:

    called_percent: an answer that is, or begins, a call; valid_percent: in valid JSON; function_percent: of the right
    functions; right_percent: with the right arguments. false_percent: of the others, that call; None if there are none.
    """

    expected: int
    others: int
    called_percent: float
    valid_percent: float
    function_percent: float
    right_percent: float
    false_percent: float | None


def same_calls(said: Sequence[Call] | None, right: Sequence[Call]) -> bool:
    """Whether functions and arguments are equal as JSON values, in any order of the calls."""
    return said is not None and sorted(map(_key, said)) == sorted(map(_key, right))


def count_calls(answers: Sequence[tuple[str, str]]) -> ToolCalls | None:
    """Figures over (expected, said) answers; None if none of them should be a call."""
    read = [(read_calls(expected), read_calls(said)) for expected, said in answers]
    pairs = [(right, said) for right, said in read if right]
    others = [said for right, said in read if not right]
    if not pairs:
        return None
    return ToolCalls(
        len(pairs),
        len(others),
        _percent([said is None or bool(said) for _, said in pairs]),
        _percent([bool(said) for _, said in pairs]),
        _percent([sorted(c.name for c in said or ()) == sorted(c.name for c in right) for right, said in pairs]),
        _percent([same_calls(said, right) for right, said in pairs]),
        _percent([said is None or bool(said) for said in others]) if others else None,
    )


def _percent(flags: Sequence[bool]) -> float:
    return 100 * sum(flags) / len(flags)


def _key(call: Call) -> str:
    return json.dumps([call.name, _canonical(call.arguments)], sort_keys=True)


def _canonical(value: Any) -> Any:
    """5 and 5.0 are one JSON number; true and 1 are not one value."""
    if isinstance(value, dict):
        return {name: _canonical(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_canonical(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
