"""Held-out rows beside the answers to them: what was asked, and what tells one kind of row from another."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from qft.bundle.classifier import Labels
from qft.data.conversations import text_of
from qft.data.rows import read_rows
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.measure.quality import RowAnswer
from qft.measure.slices import by_length, check_columns
from qft.report.summary import Asked
from qft.sources import fetch
from qft.stages import prepare
from qft.stages.job import Job

_OF_A_CONVERSATION = re.compile(r" answer \d+$")
_MOST_LABELS = 24  # that answers are sorted by


def asked(job: Job, target: str) -> list[Asked]:
    """Every answer to the held-out rows; empty if some of them, or the rows, are no longer there.

    Raises InputError if other rows lie there by now, as after `qft plan` of a file that was edited.
    """
    shipped, before, tuned = (job.answers(stage) for stage in (f"quantize-{target}", "baseline", "tune"))
    path = job.run.data / "eval.jsonl"
    if not (shipped and tuned) or not path.exists():
        return []
    rows = job.rows("eval")
    prompts = job.task.asked(rows, TextTokenizer.load(job.run.bundle(target)))
    if not all(_are_to(rows, len(prompts), kept) for kept in (shipped, before, tuned) if kept):
        raise InputError(
            "other rows are held out by now than those that were measured",
            where=str(path),
            hint=f"`qft run {job.run.root}` measures these",
        )
    begin = len(os.path.commonprefix(prompts))
    end = len(os.path.commonprefix([prompt[begin:][::-1] for prompt in prompts]))
    old = [answer.answer for answer in before] or [""] * len(shipped)  # the stage baseline may be left out
    return [
        Asked(said, text[begin : len(text) - end], first, new.answer)
        for said, text, first, new in zip(shipped, prompts, old, tuned, strict=True)
    ]


def _are_to(rows: Sequence[Any], count: int, answers: Sequence[RowAnswer]) -> bool:
    """Whether answers are to these rows, which ask for `count` of them."""
    places = {row.where for row in rows}
    return len(answers) == count and all(
        one.where in places or _OF_A_CONVERSATION.sub("", one.where) in places for one in answers
    )


def labels_of(job: Job) -> Labels:
    """What answers are chosen from, where rows have labels."""
    found = job.facts(prepare.Facts).labels
    return Labels(found.names, found.several)


def cuts(job: Job, rows: Sequence[Asked]) -> dict[str, list[str | None]]:
    """Ways of telling rows apart, each with every row's value: length, label, data.group_column and report.slices."""
    texts = [row.prompt or row.shipped.expected for row in rows]
    spoken = job.recipe.task == "automatic-speech-recognition"  # asked by a file's name
    lengths = [len(row.shipped.expected if spoken else text) for row, text in zip(rows, texts, strict=True)]
    expected: list[str | None] = [row.shipped.expected for row in rows]
    found: dict[str, list[str | None]] = {"length": [*by_length(lengths, "characters")]}
    if set(expected) <= set(labels_of(job).names) and len(set(expected)) <= _MOST_LABELS:
        found["label"] = expected
    columns = [*(job.recipe.report.slices or ()), *filter(None, [job.recipe.data.group_column])]
    places = [_OF_A_CONVERSATION.sub("", row.shipped.where) for row in rows]
    try:
        values = _columns(job, columns) if columns else {}
    except InputError:
        if job.recipe.report.slices:
            raise
        values = {}  # the rows have gone or changed since, and nothing of them was asked for
    return found | {
        column: [values.get(where, {}).get(column) for where in places] for column in dict.fromkeys(columns)
    }


def _columns(job: Job, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Where a row stands → its values of some columns, read from the sources again. Raises InputError if they have changed."""
    rows, recorded = [], {source.sha256 for source in job.facts(prepare.Facts).data}
    for uri in prepare.row_uris(job.recipe):
        source = fetch(
            uri, relative_to=job.relative_to, cache=job.cache, repo_type="dataset", on_progress=job.on_progress
        )
        if source.sha256 not in recorded:
            raise InputError(f"{uri} has changed since the run", where="report.slices", hint="run it again")
        rows += read_rows(source.path, **prepare.layout_of(job.recipe))
    check_columns(columns, [row.values for row in rows])
    return {
        row.where: {name: text_of(row.values[name]) for name in columns if row.values.get(name) is not None}
        for row in rows
    }
