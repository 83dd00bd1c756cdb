"""Changed copies of training rows: words left out, swapped, or replaced from a list of the user's own (EDA, arXiv 1901.11196)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qft.data.examples import Example, around_place
from qft.errors import InputError


@dataclass(frozen=True)
class Changes:
    """What happens to a copy's words. word_dropout, synonym: chance of each word; word_swap: of each pair of neighbours.

    synonyms: word in lower case → words that may stand in its place.
    """

    word_dropout: float
    word_swap: float
    synonym: float
    synonyms: Mapping[str, Sequence[str]]


def read_synonyms(text: str) -> dict[str, list[str]]:
    """A line is a group of words, with commas between, each of which may stand for the others."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",") if word.strip()]
        for word in words:
            found.setdefault(word.lower(), []).extend(other for other in words if other != word)
    return found


def changed_copies(
    examples: Sequence[Example], changes: Changes, *, copies: int, prompt: str | None, seed: int
) -> list[Example]:
    """Up to `copies` changed copies of every example: those that came out as the row itself or as another copy are left out.

    prompt: the recipe's text around a row's own words, which stays as it is. Raises InputError for rows without a question.
    """
    found = []
    for example in examples:
        if example.text is not None or example.passage is not None:
            raise InputError(
                "only rows with a question or a text and its answer can be changed",
                where="data.augment.copies",
                hint="leave data.augment out: plain texts and contexts of questions stay as they are",
            )
        seen = {example.key()}
        for number in range(copies):
            digest = hashlib.sha256(f"{seed}\0{number}\0{example.key()}".encode()).digest()
            copy = _changed(example, changes, prompt, random.Random(digest))
            if copy.key() not in seen:
                seen.add(copy.key())
                found.append(copy)
    return found


def _changed(example: Example, changes: Changes, prompt: str | None, chance: random.Random) -> Example:
    asked = example.messages[-2]
    before, own, after = _own_words(asked.content, prompt)
    words = replace(asked, content=before + change(own, changes, chance) + after)
    return replace(example, messages=(*example.messages[:-2], words, example.messages[-1]))


def _own_words(content: str, prompt: str | None) -> tuple[str, str, str]:
    """What stands before a row's own words, these, and what stands after them."""
    if parts := around_place(prompt or ""):
        before, _, after = parts
        if content.startswith(before) and content.endswith(after):
            return before, content[len(before) : len(content) - len(after)], after
    return "", content, ""


def change(text: str, changes: Changes, chance: random.Random) -> str:
    """A text with its words changed; where no spaces stand between words (Chinese), a character counts as one."""
    between = " " if " " in text.strip() else ""
    words = text.split() if between else list(text.strip())
    words = [_replaced(word, changes, chance) for word in words]
    for place in range(len(words) - 1):
        if chance.random() < changes.word_swap:
            words[place], words[place + 1] = words[place + 1], words[place]
    kept = [word for word in words if chance.random() >= changes.word_dropout]
    return between.join(kept or words[:1])


def _replaced(word: str, changes: Changes, chance: random.Random) -> str:
    """The word, or one of its synonyms with its punctuation and its capital."""
    core = word.strip(".,;:!?\"'()")
    others = changes.synonyms.get(core.lower())
    if not core or not others or chance.random() >= changes.synonym:
        return word
    other = chance.choice(others)
    return word.replace(core, other.capitalize() if core[0].isupper() else other)
