"""How good a model is at finding answers in contexts: exact match and F1 of words, as SQuAD's own script counts them."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from qft.bundle.reader import PADDING, Found, Reading, find
from qft.data.windows import Window, by_question
from qft.measure.agreement import TOP, log_softmax
from qft.measure.quality import Measuring, Quality, RowAnswer, batches
from qft.progress import Progress

_CHARACTER = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts without spaces: a character is a word


class Reader(Protocol):
    """A model that can be measured: float32 logits (rows, 2, longest)."""

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray: ...


def words(text: str) -> list[str]:
    """What an answer is compared by: lower case, without punctuation and articles (SQuAD, arXiv 1606.05250).

    Chinese and Japanese are counted by character, and their own punctuation is dropped too (as in CMRC, arXiv 1810.07366).
    """
    text = "".join(letter for letter in text.lower() if not _is_punctuation(letter))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return re.sub(f"([{_CHARACTER}])", r" \1 ", text).split()


def _is_punctuation(letter: str) -> bool:
    # SQuAD's script drops ASCII punctuation alone; what lies above U+3000 is in no text that it was written for.
    return letter in string.punctuation or (letter > "\u3000" and unicodedata.category(letter).startswith("P"))


def exact_match(answer: str, right: Sequence[str]) -> bool:
    """Whether an answer has the very words of one that is right; `right` is empty where there is no answer."""
    return any(words(answer) == words(one) for one in right or [""])


def f1(answer: str, right: Sequence[str]) -> float:
    """The best F1, 0 to 1, of an answer's words and those of one that is right; no answer is right only where there is none."""
    return max(_f1(words(answer), words(one)) for one in right or [""])


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right))


def measure_answers(
    runner: Reader, rows: Sequence[Window], reading: Reading, how: Measuring
) -> tuple[Quality, list[RowAnswer]]:
    """Measure every question, by f1 or exact_match. rows: the windows of one question after the other."""
    logits = all_logits(runner, rows, how)
    answers = []
    for numbers in by_question(rows):
        windows, values = [rows[n] for n in numbers], [logits[n] for n in numbers]
        found = find(windows, values, reading)
        nats = float(np.mean([window_nats(*pair) for pair in zip(windows, values, strict=True)]))
        answers.append(_answer(windows[0], found, nats))
    exact, score = 100 * float(np.mean([a.right for a in answers])), 100 * float(np.mean([a.f1 for a in answers]))
    return Quality(
        "f1" if how.metric == "auto" else how.metric,
        exact if how.metric == "exact_match" else score,
        float(np.mean([a.loss for a in answers])),
        len(answers),
        len(rows),
        exact_match_percent=exact,
        f1_percent=score,
    ), answers


def _answer(window: Window, found: Found, nats: float) -> RowAnswer:
    expected, right = " | ".join(dict.fromkeys(window.answers)), exact_match(found.text, window.answers)
    shared = f1(found.text, window.answers)
    return RowAnswer(window.where, expected, found.text, right, True, nats, found.probability, f1=shared)


def all_logits(runner: Reader, rows: Sequence[Window], how: Measuring) -> list[np.ndarray]:
    """float32 (2, places) of every window, in their order."""
    found: dict[int, np.ndarray] = {}
    for batch in batches([len(r.input_ids) for r in rows], how.batch_size):
        for number, values in zip(batch, runner.logits([rows[i].input_ids for i in batch], 2), strict=True):
            found[number] = values[:, : len(rows[number].input_ids)]
            if how.witness is not None:
                # A record keeps as many places of every row, of short ones some that hold nothing.
                missing = max(0, TOP - found[number].shape[1])
                how.witness.look(number, np.pad(found[number], ((0, 0), (0, missing)), constant_values=PADDING))
        how.on_progress(Progress("measure", len(found), len(rows), "rows"))
    return [found[number] for number in range(len(rows))]


def window_nats(window: Window, logits: np.ndarray) -> float:
    """Mean cross entropy of the places of the answer's first and last token."""
    return -float(log_softmax(logits)[[0, 1], list(window.span)].mean())
