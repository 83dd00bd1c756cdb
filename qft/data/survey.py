"""A file or folder somebody has → its rows, and the keys of section data that read them so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qft.data.audio import RATE, find_clip, samples
from qft.data.guess import Guess
from qft.data.rows import SOUNDS, Row, read_rows
from qft.errors import InputError

_HELD_OUT = {"eval": ("test", "eval"), "validation": ("validation", "valid", "val", "dev")}
_HEADER_WORDS = 6  # more are a text, not a name
_MOST_CLIPS = 3000  # whose length is looked at


@dataclass(frozen=True)
class Survey:
    """path: the file or folder to name as data.train. keys: of section data. because: what had to be guessed to read it."""

    path: Path
    rows: list[Row]
    keys: dict[str, Any] = field(default_factory=dict)
    because: str = ""


def survey(path: Path) -> Survey:
    """Read rows as they lie. Raises InputError if there is no such file, or none of a kind that is read."""
    if not path.exists():
        near = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        raise InputError(f"no such file or folder: {path}", hint=f"there are {', '.join(near)}" if near else "")
    if path.is_dir():
        return _folder(path)
    if path.name.removesuffix(".gz").endswith(".txt"):
        return _text(path)
    found = Survey(path, read_rows(path, columns=None))
    header = list(found.rows[0].values)
    if path.name.removesuffix(".gz").endswith((".csv", ".tsv")) and _is_a_row(header, found.rows):
        return _without_header(path, len(header))
    return found


def held_out_beside(path: Path) -> dict[str, Path]:
    """Files beside `train…` that are named as it with test or validation in its place, by the key of section data."""
    found = {}
    if "train" in path.name and path.is_file():
        for key, words in _HELD_OUT.items():
            there = [other for word in words if (other := path.with_name(path.name.replace("train", word))).is_file()]
            if there:
                found[key] = there[0]
    return found


def _folder(path: Path) -> Survey:
    tables = sorted(p for p in path.iterdir() if re.search(r"\.(csv|tsv|jsonl?|parquet)(\.gz)?$", p.name))
    sound = any(p.suffix.lower() in (*SOUNDS, ".tar") for p in path.rglob("*"))
    train = next((p for p in tables if "train" in p.name), None)
    if train or (sound and tables):
        return survey(train or tables[0])
    texts = sorted(path.glob("*.txt"))
    if tables and texts and not sound:
        raise InputError(
            f"{path} holds tables and texts: {', '.join(p.name for p in [*tables, *texts][:6])}",
            hint="name one of them, or put those that belong together into a folder of their own",
        )
    if not sound and texts and not any(path.glob("*/*.txt")) and (len(texts) == 1 or _prose(texts)):
        return Survey(
            path, [row for p in texts for row in _text(p).rows], _separator(texts), "each file is one long text"
        )
    return Survey(path, read_rows(path, columns=None))


def _text(path: Path) -> Survey:
    """Fields between tabs, or texts."""
    lines = [str(row.values["text"]) for row in read_rows(path, columns=None)]
    tabs = {line.count("\t") for line in lines[:1000]}
    if len(tabs) == 1 and (fields := tabs.pop() + 1) > 1:
        return _without_header(path, fields)
    keys = _separator([path])
    return Survey(path, read_rows(path, columns=None, **keys), keys)


def _separator(paths: Sequence[Path]) -> dict[str, Any]:
    """Empty lines, where they stand between paragraphs of broken lines."""
    return {"text_separator": "\n\n"} if _prose(paths) else {}


def _prose(paths: Sequence[Path]) -> bool:
    """Whether the files are broken into lines, with empty ones between paragraphs."""

    def lines() -> Iterator[str]:
        for path in paths:
            yield from (str(r.values["text"]) for r in read_rows(path, columns=None, text_separator=""))

    text = "\n".join(lines())
    count = text.count("\n") + 1
    return 0.03 < text.count("\n\n") / count < 0.45


def _is_a_row(header: Sequence[str], rows: Sequence[Row]) -> bool:
    """Whether the first line is no header: it holds a number, a long text, or what others hold in the same place."""

    def is_data(name: str) -> bool:
        values = [row.values[name] for row in rows[:1000]]
        return len(name.split()) > _HEADER_WORDS or bool(re.fullmatch(r"-?\d+(\.\d+)?", name)) or values.count(name) > 1

    return any(name.strip() and is_data(name) for name in header)


def _without_header(path: Path, fields: int) -> Survey:
    names = [f"column{number}" for number in range(1, fields + 1)]
    return Survey(path, read_rows(path, columns=names), {"columns": names}, "the first line is a row, not a header")


def named_by_use(found: Survey, guess: Guess) -> tuple[Survey, Guess]:
    """Columns of a file without a header get the names that a recipe expects, so that it need not name them twice."""
    columns = found.keys.get("columns")
    keys = {"text_column": "text", "label_column": "label"}
    if not columns or not set(guess.data) & set(keys):
        return found, guess
    new = {str(guess.data[key]): name for key, name in keys.items() if key in guess.data}
    renamed = {**found.keys, "columns": [new.get(name, name) for name in columns]}
    rows = [
        replace(row, values={new.get(name, name): value for name, value in row.values.items()}) for row in found.rows
    ]
    because = guess.because
    for old, name in new.items():
        because = because.replace(repr(old), repr(name))
    read = replace(guess.read, name=new.get(guess.read.name, guess.read.name))
    written = guess.written and replace(guess.written, name=new.get(guess.written.name, guess.written.name))
    data = {**guess.data, **{key: name for key, name in keys.items() if key in guess.data}}
    return replace(found, keys=renamed, rows=rows), replace(
        guess, because=because, read=read, written=written, data=data
    )


def sound_keys(found: Survey, column: str) -> tuple[dict[str, Any], int]:
    """data.audio_folder, where it is not the rows' own; and seconds of the longest clip, 30 if there are many.

    Raises InputError if the first clip is nowhere near the rows.
    """
    home = found.path if found.path.is_dir() else found.path.parent
    places = [home, *sorted(p for p in home.rglob("*") if p.is_dir() or p.suffix == ".tar")]
    names = [str(row.values[column]) for row in found.rows if row.values.get(column)]
    for place in places:
        try:
            find_clip([place], names[0], found.rows[0].where)
        except InputError:
            continue
        keys = {} if place == home else {"audio_folder": place}
        if len(names) > _MOST_CLIPS:
            return keys, 30
        longest = max(len(samples(find_clip([place], name, column))) for name in names)
        return keys, min(30, max(1, -(-longest // RATE)))
    raise InputError(
        f"no sound file {names[0]} in {home}, its folders or its .tar files",
        where=found.rows[0].where,
        hint="put the sound files beside the rows, or write a recipe with data.audio_folder",
    )
