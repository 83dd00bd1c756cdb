"""A bundle is asked for texts, or for the rows of a file. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qft.bundle.lines import lines_of
from qft.bundle.manifest import Bundle
from qft.bundle.predict import Predicted, predictions
from qft.bundle.sampling import Sampling
from qft.cli.bundles import by_option, open_bundle, sampled
from qft.console import Screen, given_lines, print_json, print_line
from qft.data.rows import read_rows
from qft.errors import InputError
from qft.files import file_aside
from qft.progress import Progress


@click.command("predict")
@click.argument("texts", nargs=-1)
@click.option("--rows", type=click.Path(path_type=Path, exists=True), help="Rows to answer: jsonl, csv, … or a folder.")
@click.option(
    "--column", metavar="NAME", help="Of the rows, that is asked; default: the recipe's, or `text`, `question` …"
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON lines: each row and what is predicted."
)
@click.option("--max-new-tokens", default=64, show_default=True, help="Longest answer.")
@click.option("--labels", metavar="A,B,C", help="Choose one of these; default: of those it was tuned on, if it was.")
@click.option("--schema", type=click.Path(path_type=Path), help="JSON Schema file that every answer is kept to.")
@click.option("--among", type=click.Path(path_type=Path), help="Text file: the lines nearest to each text are given.")
@sampled
@by_option
def predict_command(
    texts: tuple[str, ...],
    rows: Path | None,
    column: str | None,
    out: Path | None,
    max_new_tokens: int,
    labels: str | None,
    schema: Path | None,
    among: Path | None,
    sampling: Sampling,
    stop: tuple[str, ...],
    bundle_name: str | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Answer TEXTS, the lines of stdin, or ROWS of a file, with a bundle; the recipe's prompt is put around each.

    A line may be a conversation: {"messages": […], "tools": […]}, as JSON. A bundle that finds answers in a context is asked
    with JSON lines: {"question": "…", "context": "…"}; one that writes down speech with the names of sound files; one for search
    gives a text's vector or, with --among, what it finds. Rows have these as columns. OUT gets every row with one more,
    `predicted`; it is there when the last row is answered.
    """
    if labels and schema:
        raise InputError("an answer is kept to labels or to a schema", where="--labels, --schema", hint="leave one out")
    if out is not None:
        _check_out(out)
    if column and rows is None:
        raise InputError("a column is one of rows", where="--column", hint="name their file with --rows")
    bundle = open_bundle(bundle_name, runs)
    given, lines = _asked(texts, rows, column, bundle)
    answers = predictions(
        bundle,
        lines,
        bundle.runner(),
        max_new_tokens=max_new_tokens,
        labels=[name.strip() for name in labels.split(",")] if labels else (),
        schema=_schema(schema) if schema else None,
        sampling=sampling,
        stop=stop,
        among=_lines(among) if among else (),
    )
    if out is not None:
        _write(out, given, answers, as_json=as_json)
    elif as_json:
        print_json({"answers": [{"input": line, **asdict(a)} for line, a in zip(lines, answers, strict=True)]})
    else:
        for answer in answers:
            print_line(str(answer))


def _check_out(out: Path) -> None:
    if out.suffix != ".jsonl":
        raise InputError(f"{out} would hold JSON lines", where="--out", hint=f"name it {out.with_suffix('.jsonl')}")
    if out.exists():
        raise InputError(f"{out} is there already", where="--out", hint="name another file, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {out.parent}: {error.strerror}", where="--out") from None


def _asked(
    texts: Sequence[str], rows: Path | None, column: str | None, bundle: Bundle
) -> tuple[list[dict[str, Any]], list[str]]:
    """What is given, as rows, and the line that each asks."""
    if rows is None:
        lines = list(texts) or list(given_lines())
        if not lines:
            raise InputError("nothing to answer", hint='as in `qft predict "A waste of two hours."`')
        return [{"text": line} for line in lines], lines
    if texts:
        raise InputError("texts or rows are answered, not both at once", where="--rows", hint="leave one out")
    found = read_rows(rows, columns=None)
    home = rows if rows.is_dir() else rows.parent
    return [row.values for row in found], lines_of(found, bundle.manifest, home, column)


def _write(out: Path, given: Sequence[dict[str, Any]], answers: Iterator[Predicted], *, as_json: bool) -> None:
    screen = Screen(quiet=as_json)
    with screen.shown(), file_aside(out) as aside, aside.open("w", encoding="utf-8", newline="\n") as stream:
        for number, (row, answer) in enumerate(zip(given, answers, strict=True), 1):
            line = json.dumps(row | {"predicted": asdict(answer)}, ensure_ascii=False, default=str)
            stream.write(line + "\n")
            screen.on_progress(Progress("predict", number, len(given), "rows"))
    if as_json:
        print_json({"out": str(out), "rows": len(given)})
    else:
        print_line(f"{out}: {len(given):,} rows")


def _schema(path: Path) -> Any:
    try:
        return json.loads(_read(path, "--schema"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", where="--schema") from None


def _lines(path: Path) -> list[str]:
    if not (lines := [line for line in _read(path, "--among").splitlines() if line.strip()]):
        raise InputError(f"{path} holds no line", where="--among", hint="write a text a line")
    return lines


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", where=option) from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8", where=option) from None
