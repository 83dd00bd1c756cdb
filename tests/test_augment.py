"""Changed copies: only the row's own words change, by the chances asked for, the same each time."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from qft.data.augment import Changes, change, changed_copies, read_synonyms
from qft.data.examples import Example
from qft.data.tokenizer import Message
from qft.errors import InputError

NOTHING = Changes(0.0, 0.0, 0.0, {})
WORDS = [f"w{n}" for n in range(20_000)]


def example(text: str) -> Example:
    return Example((Message("user", text), Message("assistant", "good")), None, "good", "r", ("good",))


def test_words_are_left_out_by_chance_and_never_all() -> None:
    kept = change(" ".join(WORDS), Changes(0.3, 0.0, 0.0, {}), random.Random(0)).split()
    assert abs(1 - len(kept) / len(WORDS) - 0.3) < 4 * (0.3 * 0.7 / len(WORDS)) ** 0.5
    assert kept == sorted(kept, key=lambda word: int(word[1:]))
    assert change("one two", Changes(1.0, 0.0, 0.0, {}), random.Random(0)) == "one"


def test_neighbours_change_places_and_none_is_lost() -> None:
    swapped = change(" ".join(WORDS), Changes(0.0, 0.2, 0.0, {}), random.Random(0)).split()
    assert Counter(swapped) == Counter(WORDS)
    moved = sum(a != b for a, b in zip(swapped, WORDS, strict=True)) / len(WORDS)
    # A place keeps its word if neither of its pairs is swapped; a word carried on moves each place it passes.
    assert 0.2 < moved < 0.4


def test_synonyms_keep_capitals_and_punctuation() -> None:
    synonyms = read_synonyms("film, movie, picture\n\n dull ,boring\n")
    assert synonyms["film"] == ["movie", "picture"]
    assert synonyms["boring"] == ["dull"]
    assert (
        change("Dull film!", Changes(0, 0, 1.0, {**synonyms, "film": ["movie"]}), random.Random(0)) == "Boring movie!"
    )
    words = change("film " * 9000, Changes(0, 0, 0.3, synonyms), random.Random(0)).split()
    counts = Counter(words)
    assert counts.keys() == {"film", "movie", "picture"}
    assert abs(counts["film"] / 9000 - 0.7) < 0.02  # four standard errors


def test_where_no_spaces_stand_a_character_is_a_word() -> None:
    text = "房间很干净服务也好" * 50
    shorter = change(text, Changes(0.5, 0.0, 0.0, {}), random.Random(0))
    assert " " not in shorter
    assert set(shorter) == set(text)
    assert 0.4 < len(shorter) / len(text) < 0.6


def test_the_recipes_prompt_and_the_answer_stay() -> None:
    prompt = "Is {{this}} good? {text}\nAnswer:"
    row = example("Is {this} good? a very fine old film\nAnswer:")
    copies = changed_copies([row], Changes(0.4, 0.3, 0.0, {}), copies=5, prompt=prompt, seed=0)
    assert 2 <= len(copies) <= 5
    for copy in copies:
        asked, answer = copy.messages
        assert asked.content.startswith("Is {this} good? ")
        assert asked.content.endswith("\nAnswer:")
        assert answer == row.messages[1]
        assert (copy.labels, copy.where) == (row.labels, row.where)
    assert len({copy.key() for copy in copies} | {row.key()}) == len(copies) + 1


def test_copies_are_the_same_each_time_and_unchanged_ones_are_left_out() -> None:
    rows, changes = [example(f"a fine film number {n}") for n in range(50)], Changes(0.2, 0.2, 0.0, {})
    once = changed_copies(rows, changes, copies=2, prompt=None, seed=0)
    assert once == changed_copies(rows, changes, copies=2, prompt=None, seed=0)
    assert once != changed_copies(rows, changes, copies=2, prompt=None, seed=1)
    assert changed_copies(rows, NOTHING, copies=3, prompt=None, seed=0) == []


def test_plain_texts_are_not_changed() -> None:
    with pytest.raises(InputError, match="leave data.augment out"):
        changed_copies([Example((), "text", None, "r")], NOTHING, copies=1, prompt=None, seed=0)
