"""Sources mixed by weight: the share asked for, the same rows each time, nothing said that does not hold."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from qft.data.examples import Example
from qft.data.mix import Mixed, mix
from qft.data.tokenizer import Message
from qft.errors import InputError


def rows(count: int, source: int) -> list[Example]:
    turns = [(Message("user", f"{source} {n}"), Message("assistant", "a")) for n in range(count)]
    return [Example(messages, None, None, "", source=source) for messages in turns]


ROWS = [*rows(40, 0), *rows(100, 1)]


@pytest.mark.parametrize(("weights", "sizes"), [([1, 1], (40, 100)), ([3, 0.5], (120, 50)), ([2.25, 0], (90, 0))])
def test_a_source_is_seen_as_often_as_its_weight_says(weights: list[float], sizes: tuple[int, int]) -> None:
    mixed, counts = mix(ROWS, ["a", "b"], weights, seed=0)
    assert counts == [Mixed("a", weights[0], 40, sizes[0]), Mixed("b", weights[1], 100, sizes[1])]
    for source, weight in enumerate(weights):
        seen = Counter(e.key() for e in mixed if e.source == source)
        assert sum(seen.values()) == sizes[source]
        assert all(count in (int(weight), int(weight) + 1) for count in seen.values())


def test_rows_are_chosen_by_hash_and_seed() -> None:
    half = mix(ROWS, ["a", "b"], [0.5, 0.5], seed=0)[0]
    assert half == mix(ROWS, ["a", "b"], [0.5, 0.5], seed=0)[0]
    assert half != mix(ROWS, ["a", "b"], [0.5, 0.5], seed=1)[0]
    more = mix([*ROWS, *rows(101, 1)[100:]], ["a", "b"], [0.5, 0.5], seed=0)[0]
    assert len({e.key() for e in half} - {e.key() for e in more}) <= 1  # one more row moves one choice


def test_weights_that_fit_no_source_are_refused() -> None:
    with pytest.raises(InputError, match=re.escape("3 weights for 2 sources")):
        mix(ROWS, ["a", "b"], [1, 2, 3], seed=0)
    with pytest.raises(InputError, match="no row is left"):
        mix(ROWS, ["a", "b"], [0, 0], seed=0)
