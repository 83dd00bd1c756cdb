"""A rating sorted into labels: `{negative: '<= -1', positive: '>= 1'}`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from qft.errors import InputError

Bins = Mapping[str, Callable[[float], bool]]  # label → whether a rating has it

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "==": lambda a, b: a == b,
}


class NoBin(Exception):
    """Not an error: this row is left out."""


def read_bins(conditions: Mapping[str, str] | None) -> Bins:
    """Conditions as a recipe has them. Raises InputError for one that cannot be read."""
    return {label: _condition(label, text) for label, text in (conditions or {}).items()}


def bin_of(value: Any, bins: Bins, where: str) -> str:
    """The label of a rating. Raises NoBin if it has none, InputError if it has several or is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{value!r} is not a number, so data.bins cannot sort it", where=where) from None
    found = [label for label, holds in bins.items() if holds(number)]
    if len(found) > 1:
        raise InputError(
            f"{number} is in several bins: {', '.join(found)}", where="data.bins", hint="bins must not overlap"
        )
    if not found:
        raise NoBin
    return found[0]


def _condition(label: str, text: str) -> Callable[[float], bool]:
    if match := re.fullmatch(rf"\s*(<=|>=|==|<|>){_NUMBER}", text):
        compare, bound = _COMPARE[match[1]], float(match[2])
        return lambda value: compare(value, bound)
    if match := re.fullmatch(rf"{_NUMBER}\.\.{_NUMBER}", text):
        low, high = float(match[1]), float(match[2])
        return lambda value: low <= value <= high
    raise InputError(
        f"cannot read the condition {text!r}",
        where=f"data.bins.{label}",
        hint="write '<= -1', '>= 1', '== 3' or '-0.5 .. 0.5'",
    )
