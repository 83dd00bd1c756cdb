"""Examples → pairs of texts that should lie near each other, for models that turn a text into a vector."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from qft.data.encode import EncodeCounts, tokens_of
from qft.data.examples import Example
from qft.data.labelled import shortened
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.progress import OnProgress, Progress, silent


@dataclass(frozen=True)
class Similar:
    """A text and another one like it. input_ids: both, one after the other; the other begins at `other_start`.

    label: what both have in common, where rows have labels; the other text is then that of another row.
    """

    input_ids: tuple[int, ...]
    other_start: int
    text: str
    other: str
    label: str | None
    where: str

    @property
    def fed(self) -> tuple[int, ...]:
        """Token ids of the text."""
        return self.input_ids[: self.other_start]

    @property
    def other_ids(self) -> tuple[int, ...]:
        """Token ids of the other one."""
        return self.input_ids[self.other_start :]

    @property
    def targets(self) -> int:
        """A row is one thing to find."""
        return 1

    def as_dict(self) -> dict:
        """For a JSON line."""
        return asdict(self)

    @staticmethod
    def from_dict(line: dict) -> Similar:
        """Undo `as_dict`."""
        return Similar(**{**line, "input_ids": tuple(line["input_ids"])})


def alike(rows: Sequence[Similar]) -> np.ndarray:
    """bool (rows, rows): where the other text of one row is right for another one, too, as its own is.

    That is where they have one label or, without labels, one of the two texts in common. What is alike is never held against a
    row as a wrong answer.
    """
    if rows[0].label is not None:
        return _equal(row.label for row in rows)
    return _equal(row.fed for row in rows) | _equal(row.other_ids for row in rows)


def _equal(values: Iterable[object]) -> np.ndarray:
    numbers: dict[object, int] = {}
    codes = np.array([numbers.setdefault(value, len(numbers)) for value in values])
    return codes[:, None] == codes


def pair_similar(
    examples: Sequence[Example], tokenizer: TextTokenizer, *, max_length: int, on_progress: OnProgress = silent
) -> tuple[list[Similar], EncodeCounts]:
    """Encode every pair; of rows with labels, a pair is a text and another one of its label, drawn so that each is both once.

    A text whose label no other row of these has is left out, and counted as having nothing in the loss. Raises InputError for
    rows of another form, or if none is left.
    """
    pairs = _drawn(examples) if examples[0].labels is not None else [_given(example) for example in examples]
    rows: list[Similar] = []
    cut = unknown = 0
    for number, (text, other, label, where) in enumerate(pairs):
        if number % 500 == 0:
            on_progress(Progress("tokenize", number, len(pairs), "rows"))
        whole = [tokenizer.encode(part, add_special_tokens=True) for part in (text, other)]
        ids, other_ids = (shortened(part, tokenizer, max_length) for part in whole)
        cut += len(ids) < len(whole[0]) or len(other_ids) < len(whole[1])
        both = (*ids, *other_ids)
        unknown += both.count(tokenizer.unk_id) if tokenizer.unk_id is not None else 0
        rows.append(Similar(both, len(ids), text, other, label, where))
    return rows, EncodeCounts(cut, len(examples) - len(rows), unknown, tokens_of(rows), len(rows))


_Pair = tuple[str, str, str | None, str]  # text, other text, label, where


def _given(example: Example) -> _Pair:
    if (
        example.text is not None
        or example.passage is not None
        or example.clip is not None
        or len(example.messages) != 2
    ):
        raise InputError(
            "the row is no pair of texts",
            where=example.where,
            hint="sentence-similarity needs two columns such as text + positive, or text + label",
        )
    text, other = (message.content for message in example.messages)
    return text, other, None, example.where


def _drawn(examples: Sequence[Example]) -> list[_Pair]:
    """Each label's rows in a ring of random order: every one is followed by another."""
    by_label: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        if len(example.labels or ()) != 1:
            raise InputError(
                "the row has not one label", where=example.where, hint="sentence-similarity draws pairs of equal label"
            )
        by_label.setdefault(example.answer(), []).append(number)
    follows: dict[int, int] = {}
    for numbers in by_label.values():
        ring = random.Random(0).sample(numbers, len(numbers))
        follows |= dict(zip(ring, [*ring[1:], ring[0]], strict=True)) if len(ring) > 1 else {}
    if not follows:
        raise InputError(
            "no two rows have one label", where="data.label_column", hint="a pair needs two rows of a label"
        )
    return [
        (
            examples[number].messages[-2].content,
            examples[other].messages[-2].content,
            examples[number].answer(),
            examples[number].where,
        )
        for number, other in sorted(follows.items())
    ]
