"""What a column of rows holds: texts, a few values, numbers, sound files; so that its meaning can be guessed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qft.data.conversations import text_of
from qft.data.language import language_of
from qft.data.rows import Row

_SOUND = re.compile(r"\.(wav|flac|mp3|ogg)$", re.IGNORECASE)
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}\b")
_CHARACTERS_A_WORD = 2  # of scripts that write no spaces
_UNSPACED = re.compile("[\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0e7f]")
_MOST_LABELS = 500
_MOST_LABEL_WORDS = 6
_MOST_RATINGS = 20
_LANGUAGE_TEXTS = 400
_ONE_SIDED = 0.97
_SEPARATORS = (",", ";", "|")


@dataclass(frozen=True)
class Column:
    """values: of the rows looked at, in their order, None where a row has none."""

    name: str
    values: tuple[Any, ...]

    @cached_property
    def texts(self) -> list[str]:
        """Values as texts, without empty ones."""
        return [text for text in map(text_of, self.values) if text.strip()]

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each text is there."""
        return Counter(self.texts)

    @cached_property
    def words(self) -> float:
        """Mean number of words of a text."""
        return sum(map(_words, self.texts)) / max(1, len(self.texts))

    @cached_property
    def language(self) -> str | None:
        """Of its texts."""
        return language_of(self.texts[:_LANGUAGE_TEXTS])

    @property
    def nested(self) -> bool:
        """Whether values are lists or objects."""
        return any(isinstance(value, list | dict) for value in self.values)

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        return bool(self.texts) and all(map(_is_number, self.texts))

    @property
    def ratings(self) -> bool:
        """Whether values are numbers that return, too many of them to be labels."""
        return self.numeric and _MOST_RATINGS < len(self.counts) < len(self.texts) / 2

    @property
    def sounds(self) -> bool:
        """Whether values are the names of sound files."""
        return bool(self.texts) and all(_SOUND.search(text) for text in self.texts)

    @property
    def dates(self) -> bool:
        """Whether all values begin as a date does."""
        return bool(self.texts) and all(map(_DATE.match, self.texts))

    @property
    def sentences(self) -> bool:
        """Whether values are texts of several words, most of them different."""
        plain = not (self.nested or self.numeric or self.sounds or self.dates)
        return plain and self.words >= 1.5 and len(self.counts) > 0.3 * len(self.texts)

    @property
    def labels(self) -> bool:
        """Whether values are few and short, or lists of few short texts: what rows can be sorted by."""
        if self.nested:
            return 2 <= len(set(self.parts(""))) <= min(_MOST_LABELS, len(self.parts("")) / 2)
        few = 2 <= len(self.counts) <= min(_MOST_LABELS, len(self.texts) / 2)
        most = _MOST_RATINGS if self.numeric else _MOST_LABELS
        full = len(self.texts) >= 0.9 * len(self.values)
        return (
            few
            and full
            and len(self.counts) <= most
            and self.words <= _MOST_LABEL_WORDS
            and not (self.sounds or self.dates)
        )

    @property
    def one_sided(self) -> bool:
        """Whether nearly all rows have one value, so that there is little to learn."""
        return max(self.counts.values(), default=0) > _ONE_SIDED * len(self.texts)

    def parts(self, separator: str) -> list[str]:
        """Labels of all rows, where a row may have several; empty if the values are no lists of texts."""
        if separator:
            return [part.strip() for text in self.texts for part in text.split(separator) if part.strip()]
        lists = [value for value in self.values if value]
        if not all(isinstance(value, list) and all(isinstance(part, str) for part in value) for value in lists):
            return []
        return [part for value in lists for part in value]

    @property
    def separator(self) -> str | None:
        """What stands between several labels of a row, if it seems that rows have several."""
        for sign in _SEPARATORS:
            several = sum(sign in text for text in self.texts)
            if several > 0.2 * len(self.texts) and len(set(self.parts(sign))) <= len(self.counts) / 2:
                return sign
        return None

    def length(self, share: float) -> int:
        """Characters of the text that `share` of the texts are no longer than."""
        lengths = sorted(map(len, self.texts))
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))] if lengths else 0

    def described(self) -> str:
        """For messages: name, and what is in it."""
        if not self.texts:
            return f"{self.name}: empty"
        shown = self.texts[0] if len(self.texts[0]) <= 40 else f"{self.texts[0][:39]}…"
        return f"{self.name}: {len(self.counts):,} different values in {len(self.values):,} rows, such as {shown!r}"


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns of some rows, in order, without those that have no name or hold nothing."""
    names = dict.fromkeys(name for row in rows for name in row.values if str(name).strip())
    found = [Column(name, tuple(row.values.get(name) for row in rows)) for name in names]
    return [column for column in found if column.texts]


def named(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    """The first column with one of these names, in the order of the names, in any case."""
    by_name = {column.name.casefold(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _words(text: str) -> float:
    unspaced = len(_UNSPACED.findall(text))
    return len(text.split()) if not unspaced else max(1, unspaced / _CHARACTERS_A_WORD)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
