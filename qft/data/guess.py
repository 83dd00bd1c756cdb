"""Rows → which task they are for, by the names and contents of their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qft.data.columns import Column, columns_of, named
from qft.data.passages import read_passage
from qft.data.rows import Row
from qft.errors import InputError

_LOOKED_AT = 5000  # rows, spread over all of them
_TEXTS = (
    "text", "sentence", "message", "review", "content", "comment", "body", "utterance", "query", "tweet", "question",
    "description", "transcript", "transcription", "title",
)  # fmt: skip
_LABELS = ("label", "labels", "intent", "category", "class", "sentiment", "target", "topic", "tag", "tags", "type")
_SPEAKERS = ("speaker", "speaker_id", "client_id")
_ASKED = ("prompt", "question", "input", "source")
_ANSWERED = {"prompt": ("completion", "response"), "question": ("answer",), "input": ("output",), "source": ("target",)}

_WANTED = {
    "text-classification": "a column of texts and one with few different values",
    "question-answering": "columns question, context and answers (or a file of SQuAD's form)",
    "sentence-similarity": "columns text and positive, or a column of texts and one with few different values",
    "translation": "two columns of texts in two languages",
    "automatic-speech-recognition": "a column of sound files' paths and one of what is said",
    "text-generation": "columns messages; instruction and output; prompt and completion; or text",
}

Keys = Mapping[str, Any]


@dataclass(frozen=True)
class Guess:
    """task: as a recipe names it. data, sections: the keys that say which column is which, of section data and of others.

    languages: of what is read, and where another is written, of that; empty where it cannot be told. because: in words.
    read, written: the columns; characters of long ones tell how many tokens rows have. labels: how many; 0 if rows have none.
    """

    task: str
    because: str
    read: Column
    written: Column | None = None
    data: Keys = field(default_factory=dict)
    sections: Mapping[str, Keys] = field(default_factory=dict)
    labels: int = 0
    conversation: bool = False

    @property
    def languages(self) -> tuple[str, ...]:
        """Without those that cannot be told."""
        columns = [self.read] if self.labels or self.written is None else [self.read, self.written]
        return tuple(dict.fromkeys(code for column in columns if (code := column.language)))


def guesses(rows: Sequence[Row], task: str | None = None) -> list[Guess]:
    """What rows are for, the likeliest first; others are further ways of doing the same. task: the only one that counts.

    Raises InputError saying what was seen and what to give.
    """
    step = max(1, len(rows) // _LOOKED_AT)
    columns = columns_of(rows[::step])
    if named(columns, ("chosen",)) and named(columns, ("rejected",)):
        raise _cannot_tell(
            columns, "these are pairs of a chosen and a rejected answer, which qft does not tune on", task
        )
    for look in _LOOKS:
        if found := [one for one in look(columns, rows) if task in (None, one.task)]:
            return found
    raise _cannot_tell(columns, "cannot tell what the rows are for" + (f" in {task}" if task else ""), task)


def _cannot_tell(columns: Sequence[Column], what: str, task: str | None) -> InputError:
    seen = "\n  ".join(column.described() for column in columns[:12]) or "no column with anything in it"
    needed = f"for {task} give {_WANTED[task]}" if task else "\n  ".join(f"{t}: {w}" for t, w in _WANTED.items())
    return InputError(
        f"{what}; seen:\n  {seen}", hint=f"{needed}\n  rename columns so, or write a recipe yourself (`qft schema`)"
    )


def _conversations(columns: Sequence[Column], rows: Sequence[Row]) -> list[Guess]:
    talk = named(columns, ("messages", "conversations"))
    if talk is None or not talk.nested and not talk.texts[0].startswith("["):
        return []
    tools = " with tools to be called" if named(columns, ("tools",)) else ""
    because = f"column {talk.name!r} holds conversations{tools}"
    return [Guess("text-generation", because, talk, conversation=True)]


def _instructions(columns: Sequence[Column], rows: Sequence[Row]) -> list[Guess]:
    asked, answer = named(columns, ("instruction",)), named(columns, ("output",))
    if asked is None or answer is None:
        return []
    because = "columns 'instruction' and 'output': it is to answer as they do"
    return [Guess("text-generation", because, asked, answer, conversation=True)]


def _passages(columns: Sequence[Column], rows: Sequence[Row]) -> list[Guess]:
    names = {column.name for column in columns}
    if not {"question", "context"} <= names or not names & {"answers", "answer"}:
        return []
    for row in rows[:200]:
        passage = read_passage(row.values, row.where)
        if any(answer not in passage.context for answer in passage.answers):
            return []
    context = next(column for column in columns if column.name == "context")
    because = "columns 'question', 'context' and answers that stand in the context, letter for letter"
    return [Guess("question-answering", because, context)]


def _pairs(columns: Sequence[Column], rows: Sequence[Row]) -> list[Guess]:
    other, text = named(columns, ("positive",)), named(columns, ("text", "anchor", "query"))
    if text is None or other is None or text.nested or other.nested:
        return []
    because = f"columns {text.name!r} and {other.name!r}: what is like each other is to be found"
    return [Guess("sentence-similarity", because, text, other)]


def _speech(columns: Sequence[Column], rows: Sequence[Row]) -> list[Guess]:
    sound = next((column for column in columns if column.sounds), None)
    others = [column for column in columns if column is not sound and not (column.nested or column.numeric)]
    text = named(others, _TEXTS) or max(others, key=lambda column: column.words, default=None)
    if sound is None or text is None:
        return []
    keys = {"audio_column": sound.name, "text_column": text.name}
    if speaker := named(columns, _SPEAKERS):
        keys["group_column"] = speaker.name
    because = f"column {sound.name!r} names sound files, {text.name!r} holds what is said"
    return [Guess("automatic-speech-recognition", because, text, data=keys)]


def _translations(columns: Sequence[Column], rows: Sequence[Row]) -> list[Guess]:
    texts = [column for column in columns if column.sentences or column.name in ("source", "target")]
    pairs = [(a, b) for n, a in enumerate(texts) for b in texts[n + 1 :] if a.language and b.language]
    found = next(((a, b) for a, b in pairs if a.language != b.language), None)
    if found is None or any(column.labels for column in found):
        return []
    source, target = found
    because = f"column {source.name!r} is in {source.language}, {target.name!r} in {target.language}"
    pair = {"translation": {"source": source.name, "target": target.name}}
    prompt = {"format": "prompt-completion", "prompt": f"{{{source.name}}}\n{target.language}:\n"}
    written = source.name in _ANSWERED and target.name in _ANSWERED[source.name]
    by_writing = [Guess("text-generation", because, source, target, prompt)] if written else []
    return [Guess("translation", because, source, target, sections=pair), *by_writing]


def _answers(columns: Sequence[Column], rows: Sequence[Row]) -> list[Guess]:
    for name in _ASKED:
        asked, answer = named(columns, (name,)), named(columns, _ANSWERED[name])
        if asked and answer and not answer.labels and not (asked.nested or answer.nested):
            because = f"columns {asked.name!r} and {answer.name!r}: it is to answer as they do"
            return [Guess("text-generation", because, asked, answer)]
    return []


def _labelled(columns: Sequence[Column], rows: Sequence[Row]) -> list[Guess]:
    sorts = [column for column in columns if column.labels or _several(column)]
    label = named(sorts, _LABELS) or min(sorts, key=_unlikely_label, default=None)
    texts = [column for column in columns if column.sentences and column is not label]
    rest = [column for column in columns if column is not label and not (column.nested or column.numeric)]
    text = named(texts, _TEXTS) or max(texts, key=lambda c: c.words, default=None) or named(rest, _TEXTS)
    if label is None or text is None or _texts_in_lists(columns):
        return []
    separator = None if label.nested else _several(label)
    count = len(set(label.parts(separator or ""))) if separator or label.nested else len(label.counts)
    keys: dict[str, Any] = {"text_column": text.name, "label_column": label.name}
    if separator:
        keys["label_separator"] = separator
    many = " (a row may have several)" if separator or label.nested else ""
    others = [column.name for column in sorts if column is not label]
    doubt = f"; {', '.join(map(repr, others[:3]))} could be the label too" if others else ""
    because = f"column {text.name!r} holds texts, {label.name!r} {count:,} different values{many}{doubt}"
    one = Guess("text-classification", because, text, label, keys, labels=count)
    ways = ("text-generation", "sentence-similarity")  # by writing the label; by what lies near
    return [one] if many else [one, *(replace(one, task=task) for task in ways)]


def _texts_in_lists(columns: Sequence[Column]) -> bool:
    """Whether the texts proper seem to be paragraphs in a list, which rows cannot have."""
    return any(column.nested and column.parts("") and not column.labels for column in columns)


def _several(column: Column) -> str | None:
    return None if column.nested or column.numeric or column.words > 12 else column.separator


def _unlikely_label(column: Column) -> tuple[bool, bool, int]:
    return column.one_sided, column.numeric, len(column.counts)


def _plain(columns: Sequence[Column], rows: Sequence[Row]) -> list[Guess]:
    texts = [column for column in columns if column.sentences]
    text = named(texts, _TEXTS) or (texts[0] if len(texts) == 1 else None)
    if text is None or _texts_in_lists(columns):
        return []
    keys = {"format": "text", "text_column": text.name}
    because = f"column {text.name!r} holds plain text, to read on from"
    if rating := next((column for column in columns if column.ratings), None):
        because += f"; {rating.name!r} holds ratings, which data.bins makes into labels for text-classification"
    return [Guess("text-generation", because, text, data=keys)]


_LOOKS: tuple[Callable[[Sequence[Column], Sequence[Row]], list[Guess]], ...] = (
    _conversations,
    _instructions,
    _passages,
    _pairs,
    _speech,
    _translations,
    _answers,
    _labelled,
    _plain,
)
