"""A bundle is asked for texts, or for the rows of a file. No torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qft.bundle.sampling import Sampling
from qft.cli.bundles import by_option, open_bundle, sampled
from qft.console import print_json, print_line
from qft.errors import InputError


@click.command("predict")
@click.argument("texts", nargs=-1)
@click.option("--max-new-tokens", default=64, show_default=True, help="Longest answer.")
@click.option("--labels", metavar="A,B,C", help="Choose one of these; default: of those it was tuned on, if it was.")
@click.option("--schema", type=click.Path(path_type=Path), help="JSON Schema file that every answer is kept to.")
@click.option("--among", type=click.Path(path_type=Path), help="Text file: the lines nearest to each text are given.")
@sampled
@by_option
def predict_command(
    texts: tuple[str, ...],
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
    """Answer TEXTS, or the lines of stdin, with a bundle; the recipe's prompt is put around each.

    A line may be a conversation: {"messages": […], "tools": […]}, as JSON. A bundle that finds answers in a context is asked
    with JSON lines: {"question": "…", "context": "…"}; one that writes down speech with the names of sound files; one for search
    gives a text's vector or, with --among, what it finds.
    """
    if labels and schema:
        raise InputError("an answer is kept to labels or to a schema", where="--labels, --schema", hint="leave one out")
    bundle = open_bundle(bundle_name, runs)
    lines = list(texts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise InputError("nothing to answer", hint='as in `qft predict "A waste of two hours."`')
    answers = bundle.predict(
        lines,
        bundle.runner(),
        max_new_tokens=max_new_tokens,
        labels=[name.strip() for name in labels.split(",")] if labels else (),
        schema=_schema(schema) if schema else None,
        sampling=sampling,
        stop=stop,
        among=_lines(among) if among else (),
    )
    if as_json:
        said = [asdict(answer) for answer in answers]
        print_json({"answers": [{"input": line, **answer} for line, answer in zip(lines, said, strict=True)]})
    else:
        for answer in answers:
            print_line(str(answer))


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
