"""Rows → examples: conversations with answers, or plain text. One function a format."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qft.data.audio import Clip, find_clip
from qft.data.bins import Bins, NoBin, bin_of, read_bins
from qft.data.conversations import Message, Tool, read_conversation, text_of
from qft.data.passages import Passage, read_passage
from qft.data.rows import Row
from qft.errors import InputError

_SIDES = ("translation.source", "translation.target")
_PAIRS = (
    ("text", "positive"),
    ("anchor", "positive"),
    ("query", "positive"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("input", "output"),
    ("prompt", "response"),
    ("source", "target"),
)


@dataclass(frozen=True)
class Example:
    """messages with at least one assistant turn, or `text` alone (plain text).

    label: the expected answer where rows have labels. labels: those it consists of, one unless rows may have several.
    clip: the sound whose transcript the answer is.
    group: what the row has in common with others that must lie on the same side of a split (a speaker, a document).
    passage: a question with its context, of format qa. tools: functions that may be called. source: number of its source in
    data.train.
    """

    messages: tuple[Message, ...]
    text: str | None
    label: str | None
    where: str
    labels: tuple[str, ...] | None = None
    group: str | None = None
    passage: Passage | None = None
    clip: Clip | None = None
    tools: tuple[Tool, ...] = ()
    source: int = 0

    def key(self) -> str:
        """What decides the split: the prompt (tools, all turns but the last answer), case and white space folded."""
        parts = [*(str(tool["function"]) for tool in self.tools), *(m.text for m in self.messages[:-1])]
        content = self.text if self.text is not None else "\n".join(parts)
        content = f"{content}\n{self.passage.context}" if self.passage else content
        return " ".join(content.casefold().split())

    def unit(self) -> str:
        """What is split off whole: the rows of one group, or without groups those of one prompt."""
        return self.key() if self.group is None else f"group {self.group}"

    def answer(self) -> str:
        """The last answer, or the text."""
        return self.text if self.text is not None else self.messages[-1].text


@dataclass(frozen=True)
class Counts:
    """rows read; dropped because empty or in no bin; kept by label. several_labels: rows may have any number of them.

    without_group: rows kept that have no value in the group column; None where no column is named.
    """

    rows: int
    empty: int
    in_no_bin: int
    labels: dict[str, int]
    several_labels: bool = False
    without_group: int | None = None


@dataclass(frozen=True)
class Shape:
    """How rows become examples: the data keys of a recipe that say so.

    audio: the column of sound files' paths, and the folders and .tar files that they start from; None where rows are not speech.
    translation: the columns of a text and of its translation; None where rows are not translated.
    """

    format: str
    text_column: str
    label_column: str
    bins: Mapping[str, str] | None
    prompt: str | None
    system: str | None
    label_separator: str | None = None
    group_column: str | None = None
    audio: tuple[str, Sequence[Path]] | None = None
    translation: tuple[str, str] | None = None

    @property
    def asked(self) -> str:
        """The column that holds what is asked, unless the rows' own form says it: a text, a text to translate, a sound file."""
        return (self.audio or self.translation or (self.text_column,))[0]


class _Empty(Exception):
    """Not an error: this row says nothing."""


def to_examples(rows: Sequence[Row], shape: Shape) -> tuple[list[Example], Counts]:
    """Turn rows into examples. Raises InputError for missing columns, bad ratings, or labels of one class only."""
    if not rows:
        raise InputError("there are no rows", where="data.train")
    name = _guess(rows[0], shape) if shape.format == "auto" else shape.format
    make = _FORMATS[name]
    bins = read_bins(shape.bins)
    if shape.group_column and not any(shape.group_column in row.values for row in rows):
        column_of(rows[0], shape.group_column)
    several = name == "labels" and _several(rows, shape)
    shape = replace(shape, label_separator=shape.label_separator or ",") if several else shape
    examples: list[Example] = []
    empty = no_bin = 0
    for row in rows:
        try:
            example = make(row, shape, bins)
        except NoBin:
            no_bin += 1
            continue
        except _Empty:
            empty += 1
            continue
        if not example.key() or not (several or example.passage or example.answer().strip()):
            empty += 1
        else:
            group = text_of(row.values.get(shape.group_column)) or None if shape.group_column else example.group
            examples.append(_with_system(replace(example, group=group, source=row.source), shape.system))
    labels = Counter(label for e in examples for label in e.labels or ())
    if name in ("labels", "evals") and len(labels) < 2:
        raise InputError(
            f"labels of one class only: {', '.join(labels) or 'none'}",
            where="data.label_column",
            hint=f"column {shape.label_column!r} needs at least two labels; check data.bins",
        )
    alone = sum(e.group is None for e in examples) if shape.group_column else None
    return examples, Counts(len(rows), empty, no_bin, dict(labels), several, alone)


def _several(rows: Sequence[Row], shape: Shape) -> bool:
    """Whether rows may have any number of labels: their column is cut at a separator, or holds lists."""
    return shape.label_separator is not None or any(isinstance(r.values.get(shape.label_column), list) for r in rows)


def _guess(row: Row, shape: Shape) -> str:
    columns = set(row.values)
    if shape.audio is not None:
        return "speech"
    if shape.translation is not None:
        return "translation"
    if columns & {"messages", "conversations"}:
        return "messages"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if {"input", "ideal"} <= columns:
        return "evals"
    if {"question", "context"} <= columns and columns & {"answers", "answer"}:
        return "qa"
    if any({a, b} <= columns for a, b in _PAIRS):
        return "prompt-completion"
    if {shape.text_column, shape.label_column} <= columns:
        return "labels"
    if shape.text_column in columns:
        return "text"
    raise InputError(
        f"cannot tell what the columns mean: {', '.join(sorted(columns))}",
        where=row.where,
        hint="known are messages, prompt + completion, instruction + output, input + ideal, question + context + answers, "
        "text + label, text; "
        "otherwise set data.format, data.text_column, data.label_column or data.columns",
    )


def _with_system(example: Example, system: str | None) -> Example:
    if system is None or example.text is not None:
        return example
    rest = example.messages[1:] if example.messages[0].role == "system" else example.messages
    return replace(example, messages=(Message("system", system), *rest))


def column_of(row: Row, name: str, key: str = "data.columns") -> Any:
    """A row's value in a column. key: of the recipe, or option, that names it. Raises InputError if there is no such column."""
    if name in row.values:
        return row.values[name]
    near = difflib.get_close_matches(name, row.values, 1)
    raise InputError(
        f"no column {name!r}; there are {', '.join(row.values)}",
        where=row.where,
        hint=f"did you mean {near[0]!r}?" if near else f"name the columns with {key}",
    )


def _messages(row: Row, shape: Shape, bins: Bins) -> Example:
    found, tools = read_conversation(row.values, row.where)
    messages = list(found)
    while messages and messages[-1].role != "assistant":  # nothing to learn after the last answer
        messages.pop()
    if not messages:
        raise InputError("no assistant turn", where=row.where, hint="a conversation needs at least one answer to learn")
    return Example(tuple(messages), None, None, row.where, tools=tools)


def _prompt_completion(row: Row, shape: Shape, bins: Bins) -> Example:
    pair = next(((a, b) for a, b in _PAIRS if a in row.values and b in row.values), _PAIRS[0])
    prompt = fill(shape.prompt, row) if shape.prompt else text_of(column_of(row, pair[0]))
    return Example(
        (Message("user", prompt), Message("assistant", text_of(column_of(row, pair[1])))), None, None, row.where
    )


def _alpaca(row: Row, shape: Shape, bins: Bins) -> Example:
    prompt = text_of(column_of(row, "instruction"))
    if extra := text_of(row.values.get("input")):
        prompt = f"{prompt}\n\n{extra}"
    return Example(
        (Message("user", prompt), Message("assistant", text_of(column_of(row, "output")))), None, None, row.where
    )


def _qa(row: Row, shape: Shape, bins: Bins) -> Example:
    for name in ("question", "context"):
        column_of(row, name)
    passage = read_passage(row.values, row.where)
    if not passage.question or not passage.context.strip():
        raise _Empty
    prompt = fill(shape.prompt, row) if shape.prompt else passage.question
    turns = (Message("user", prompt), Message("assistant", passage.answers[0] if passage.answers else ""))
    folded = " ".join(passage.context.casefold().split())
    return Example(turns, None, None, row.where, (passage.label,), folded, passage)


def _text(row: Row, shape: Shape, bins: Bins) -> Example:
    """A column that holds a list of texts, as poems and books are often kept, has a line for each."""
    value = column_of(row, shape.text_column)
    lines = value if isinstance(value, list) and all(isinstance(line, str) for line in value) else [text_of(value)]
    return Example((), "\n".join(lines), None, row.where)


def _labels(row: Row, shape: Shape, bins: Bins) -> Example:
    value = column_of(row, shape.label_column)
    if shape.label_separator:
        parts = value if isinstance(value, list) else text_of(value).split(shape.label_separator)
        labels = tuple(dict.fromkeys(part for part in (text_of(part).strip() for part in parts) if part))
    else:
        labels = (bin_of(value, bins, row.where) if bins else text_of(value),)
    label, text = ", ".join(labels), text_of(column_of(row, shape.text_column))
    prompt = fill(shape.prompt, row) if shape.prompt and text.strip() else text
    return Example((Message("user", prompt), Message("assistant", label)), None, label, row.where, labels)


def _speech(row: Row, shape: Shape, bins: Bins) -> Example:
    """The path stands for the sound: rows with one path are one example, rows with the same words are not."""
    if shape.audio is None:
        raise InputError("data.format: speech is for task automatic-speech-recognition", where="data.format")
    column, folders = shape.audio
    path, text = text_of(column_of(row, column)), text_of(column_of(row, shape.text_column))
    messages = (Message("user", path), Message("assistant", text))
    return Example(messages, None, None, row.where, clip=find_clip(folders, path, row.where))


def _translation(row: Row, shape: Shape, bins: Bins) -> Example:
    """Two columns, or, as the hub's sets of translations have it, two keys of a column `translation`."""
    if shape.translation is None:
        raise InputError("data.format: translation is for tasks translation and text-generation", where="data.format")
    inner = row.values.get("translation")
    row = Row(inner, row.where) if isinstance(inner, dict) else row
    source, target = (text_of(column_of(row, name, key)) for name, key in zip(shape.translation, _SIDES, strict=True))
    asked = fill(shape.prompt, row) if shape.prompt and source.strip() else source
    return Example((Message("user", asked), Message("assistant", target)), None, None, row.where)


def _evals(row: Row, shape: Shape, bins: Bins) -> Example:
    """As OpenAI's evals keep them: messages in `input`, the answer (or the first of several) in `ideal`."""
    ideal = column_of(row, "ideal")
    value = ideal[0] if isinstance(ideal, list) and ideal else ideal
    label = bin_of(value, bins, row.where) if bins else text_of(value)
    answer = {"role": "assistant", "content": label}
    asked = _messages(Row({"messages": [*column_of(row, "input"), answer]}, row.where), shape, bins)
    return replace(asked, label=label, labels=(label,))


_FORMATS: dict[str, Callable[[Row, Shape, Bins], Example]] = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
    "labels": _labels,
    "evals": _evals,
    "qa": _qa,
    "speech": _speech,
    "translation": _translation,
}


_PLACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def fill(template: str, row: Row) -> str:
    """Put a row's columns into {column} places; {{ and }} are braces. No attribute or index is ever followed."""

    def place(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        return text_of(column_of(row, match[1]))

    return _PLACES.sub(place, template)


def around_place(template: str) -> tuple[str, str, str] | None:
    """What stands before a template's one {column}, its name, and what stands after it; None if there are several, or none."""
    places = [match for match in _PLACES.finditer(template) if match[1]]
    if len(places) != 1:
        return None
    nothing = Row({}, "")
    before, after = template[: places[0].start()], template[places[0].end() :]
    return fill(before, nothing), places[0][1], fill(after, nothing)
