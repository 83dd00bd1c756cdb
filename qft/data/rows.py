"""Files → rows: jsonl, json, csv, tsv, parquet, txt, po, .gz of these, folders of text files by label."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qft.data.catalogues import read_catalogue
from qft.errors import InputError, Problem

SOUNDS = (".wav", ".flac", ".mp3", ".ogg")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Row:
    """One row: column → value, and where it stands (`reviews.tsv:12`). source: number of its source in data.train."""

    values: dict[str, Any]
    where: str
    source: int = 0


def read_labelled_rows(path: Path, *, column: str, label: str, **how: Any) -> list[Row]:
    """As `read_rows` (which takes `how`), of a source whose rows all have one label, which becomes their `column`.

    Raises InputError if they have such a column already.
    """
    rows = read_rows(path, **how)
    if (row := next((row for row in rows if column in row.values), None)) is not None:
        raise InputError(
            f"the rows have a column {column!r} of their own, and data.train gives them the label {label!r}",
            where=row.where,
            hint="write data.train without labels, or another data.label_column",
        )
    return [replace(row, values={**row.values, column: label}) for row in rows]


def read_rows(path: Path, *, columns: list[str] | None, text_separator: str = "\n") -> list[Row]:
    """All rows of a file or folder. `columns` names those of a delimited file without a header line.

    text_separator: what stands between the texts of a .txt file; "" if the file is one text. Raises InputError naming the
    file and the lines that cannot be read.
    """
    if path.is_dir():
        return _read_folder(path, columns, text_separator)
    kind = _kind(path)
    if kind == "parquet":
        rows = _read_parquet(path)
    elif kind == "txt" and columns is None:
        rows = _texts(path, _read_text(path), text_separator)
    else:
        rows = _READERS[kind](path, _read_text(path), columns)
    if not rows:
        raise InputError(f"{path} holds no rows", hint="it is empty" if path.stat().st_size == 0 else "")
    return rows


def _kind(path: Path) -> str:
    suffixes = [s.lower().lstrip(".") for s in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == ["gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if kind not in {*_READERS, "parquet"}:
        raise InputError(
            f"{path.name}: files of rows end in {', '.join(f'.{k}' for k in _READERS)} or .parquet, or .gz of these",
            hint="save a spreadsheet as CSV in UTF-8; add the ending that a file without one should have, as .tsv",
        )
    return kind


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if b"\0" in content[:65536]:
        raise InputError(f"{path} is binary, not text", hint="rows are read from jsonl, csv, tsv, parquet or txt")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            "not UTF-8", where=f"{path.name}:{line}", hint="save the file as UTF-8 (iconv -f latin1 -t utf-8)"
        ) from None


def _refuse(problems: list[Problem]) -> None:
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        rest = [Problem(f"and {more} more lines like these")] if more > 0 else []
        raise InputError([*problems[:_SHOWN_PROBLEMS], *rest])


def _read_jsonl(path: Path, text: str, columns: list[str] | None) -> list[Row]:
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            problems.append(Problem(f"not JSON: {error}", where, "every line is one JSON object"))
            continue
        if isinstance(value, dict):
            rows.append(Row(value, where))
        else:
            problems.append(
                Problem(f"a {type(value).__name__}, not a JSON object", where, 'write {"column": value, …}')
            )
    _refuse(problems)
    return rows


def _read_json(path: Path, text: str, columns: list[str] | None) -> list[Row]:
    try:
        value = json.loads(text or "[]")
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=path.name, hint="one object a line is .jsonl") from None
    if isinstance(value, dict) and "data" in value:
        return _read_squad(path, value["data"])
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise InputError("not a list of objects", where=path.name)
    return [Row(row, f"{path.name}[{index}]") for index, row in enumerate(value)]


def _read_squad(path: Path, articles: Any) -> list[Row]:
    """The file of SQuAD (arXiv 1606.05250): articles of paragraphs, each with its questions."""
    try:
        return [
            Row({"context": part["context"], **asked}, f"{path.name}[{asked['id']}]")
            for article in articles
            for part in article["paragraphs"]
            for asked in part["qas"]
        ]
    except (TypeError, KeyError):
        raise InputError("neither a list of objects nor a file of SQuAD's form", where=path.name) from None


def _read_csv(path: Path, text: str, columns: list[str] | None, delimiters: str = ",;\t") -> list[Row]:
    """The delimiter is the one that the first line has most of: spreadsheets write `;` where a comma is in numbers."""
    csv.field_size_limit(1 << 27)
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(delimiters, key=first.count))
    rows: list[Row] = []
    problems: list[Problem] = []
    header = columns
    for fields in reader:
        if not fields:
            continue
        if header is None:
            header = fields
            continue
        _add(rows, problems, header, fields, f"{path.name}:{reader.line_num}")
    _refuse(problems)
    return rows


def _read_tsv(path: Path, text: str, columns: list[str] | None) -> list[Row]:
    return _read_csv(path, text, columns, delimiters="\t")


def _read_txt(path: Path, text: str, columns: list[str] | None) -> list[Row]:
    """Tab-delimited fields without quoting (real files hold stray quotes)."""
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            _add(rows, problems, columns or [], line.rstrip("\r").split("\t"), f"{path.name}:{number}")
    _refuse(problems)
    return rows


def _read_po(path: Path, text: str, columns: list[str] | None) -> list[Row]:
    """Columns `source` and `target`."""
    try:
        return [Row({"source": a, "target": b}, f"{path.name}:{line}") for a, b, line in read_catalogue(text)]
    except (OSError, ValueError) as error:  # polib's own, for what is no catalogue
        raise InputError(f"not a gettext catalogue: {error}", where=path.name) from None


def _texts(path: Path, text: str, separator: str) -> list[Row]:
    """A text between separators, with the line it begins in."""
    rows, line = [], 1
    for part in text.replace("\r\n", "\n").split(separator) if separator else [text.replace("\r\n", "\n")]:
        if part.strip():
            blank = len(part) - len(part.lstrip("\n"))
            rows.append(Row({"text": part.strip("\n")}, f"{path.name}:{line + blank}"))
        line += part.count("\n") + separator.count("\n")
    return rows


def _add(rows: list[Row], problems: list[Problem], header: list[str], fields: list[str], where: str) -> None:
    if len(fields) == len(header):
        rows.append(Row(dict(zip(header, fields, strict=True)), where))
    else:
        problems.append(
            Problem(
                f"{len(fields)} fields where {len(header)} are expected ({', '.join(header)})",
                where,
                "quote fields that hold the delimiter, or set data.columns",
            )
        )


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a parquet file: {error}") from None
    return [Row(row, f"{path.name}[{index}]") for index, row in enumerate(table.to_pylist())]


_READERS: dict[str, Callable[[Path, str, list[str] | None], list[Row]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "txt": _read_txt,
    "po": _read_po,
}


def _read_folder(folder: Path, columns: list[str] | None, text_separator: str) -> list[Row]:
    """Sound files, each with a .txt of its name that holds what is said; LABEL/*.txt (a text a file); LABEL.txt (a text between
    separators); or data files of the other kinds.
    """
    spoken = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS and p.with_suffix(".txt").is_file())
    if spoken:
        return [
            Row({"audio": p.relative_to(folder).as_posix(), "text": _read_text(p.with_suffix(".txt")).strip()}, p.name)
            for p in spoken
        ]
    by_label = sorted(p for p in folder.glob("*/*.txt"))
    if by_label:
        return [Row({"text": _read_text(p), "label": p.parent.name}, f"{p.parent.name}/{p.name}") for p in by_label]
    flat = sorted(folder.glob("*.txt"))
    if flat and columns is None:
        return [
            Row({**row.values, "label": p.stem}, row.where)
            for p in flat
            for row in read_rows(p, columns=None, text_separator=text_separator)
        ]
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lstrip(".") in {*_READERS, "parquet", "gz"})
    if not files:
        raise InputError(
            f"{folder} holds no files of rows", hint="jsonl, csv, tsv, parquet, or one folder of .txt a label"
        )
    return [row for p in files for row in read_rows(p, columns=columns, text_separator=text_separator)]
