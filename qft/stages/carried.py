"""Which words carried the shipped model's surest errors on held-out rows, where it chooses among labels."""

from __future__ import annotations

import os
from collections.abc import Sequence

from qft.bundle.manifest import Bundle
from qft.data.encode import Encoded
from qft.measure.occlusion import Carried, what_carried
from qft.measure.quality import RowAnswer
from qft.measure.writing import turns_of
from qft.stages.job import Job

_SHOWN = 6
# A model that writes reads a prompt for each word: these bound it to 75 prompts, and two labels after each.
_SHOWN_WRITTEN = 3
_MOST_WORDS_WRITTEN = 24


def carried(job: Job, target: str) -> list[Carried]:
    """Surest first; empty of a bundle that does not choose among labels. The answers must be to the rows that lie there."""
    bundle = Bundle.load(job.run.bundle(target))
    answers = job.answers(f"quantize-{target}")
    if bundle.classifies:
        return _classified(bundle, job, answers)
    return _written(bundle, job.rows("eval"), answers) if bundle.known_labels else []


def _classified(bundle: Bundle, job: Job, answers: Sequence[RowAnswer]) -> list[Carried]:
    runner, pairs = bundle.runner(), zip(job.rows("eval"), answers, strict=True)
    wrong = sorted((pair for pair in pairs if not pair[1].right), key=lambda pair: -(pair[1].probability or 0))
    return [
        what_carried(bundle, runner, row.text, answer=said.answer, expected=said.expected)
        for row, said in wrong[:_SHOWN]
    ]


def _written(bundle: Bundle, rows: Sequence[Encoded], answers: Sequence[RowAnswer]) -> list[Carried]:
    """Prompts are read as the rows have them: one whose text gives other tokens is left out."""
    asked = [rows[turn.row] for turn in turns_of(rows)]
    prompts = [bundle.tokenizer.decode(row.prompt, skip_special_tokens=False) for row in asked]
    head, tail = _around(prompts)
    wrong = [
        (prompt, said)
        for row, prompt, said in zip(asked, prompts, answers, strict=True)
        if row.label is not None
        and {said.answer, said.expected} <= set(bundle.known_labels)
        and not said.right
        and len(prompt) > len(head) + len(tail)
        and bundle.tokenizer.encode(prompt) == list(row.prompt)
    ]
    if not wrong:
        return []
    runner = bundle.runner()
    return [
        what_carried(
            bundle,
            runner,
            prompt[len(head) : len(prompt) - len(tail)],
            answer=said.answer,
            expected=said.expected,
            most_words=_MOST_WORDS_WRITTEN,
            around=(head, tail),
        )
        for prompt, said in sorted(wrong, key=lambda pair: -pair[1].loss)[:_SHOWN_WRITTEN]
    ]


def _around(prompts: Sequence[str]) -> tuple[str, str]:
    """What all prompts begin and end with, the template and the instruction; no part of a word that texts happen to share."""
    head = os.path.commonprefix(prompts)
    tail = os.path.commonprefix([prompt[len(head) :][::-1] for prompt in prompts])[::-1]
    while head and head[-1].isalnum():
        head = head[:-1]
    while tail and tail[0].isalnum():
        tail = tail[1:]
    return head, tail
