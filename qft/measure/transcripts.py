"""How well speech is written down: word and character error rates of greedy transcripts. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qft.bundle.seq2seq import Seq2SeqRunner
from qft.data.sequences import MOST_TOKENS, Pair
from qft.data.tokenizer import TextTokenizer
from qft.measure.agreement import log_softmax
from qft.measure.english import normalized
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.progress import Progress

_ROWS = 16  # whose encoder states are held at a time


def measure_transcripts(
    runner: Seq2SeqRunner, rows: Sequence[Pair], tokenizer: TextTokenizer, how: Measuring
) -> tuple[Quality, list[RowAnswer]]:
    """Measure every row: loss of the expected text, and what is written instead where that is not the likeliest one."""
    answers: list[RowAnswer] = []
    hits, longest = 0, max(row.targets for row in rows) + how.extra_tokens
    most = min(longest, MOST_TOKENS - rows[0].answer_start)
    for start in range(0, len(rows), min(_ROWS, how.batch_size)):
        some = rows[start : start + min(_ROWS, how.batch_size)]
        logits = runner.logits([row.fed for row in some], max(row.targets for row in some))
        for number, (row, values) in enumerate(zip(some, logits, strict=True), start):
            said, targets = values[-row.targets :], list(row.input_ids[row.answer_start :])
            if how.witness is not None:
                how.witness.look(number, said)
            nats = -log_softmax(said)[np.arange(row.targets), targets]
            hits += int((said.argmax(-1) == targets).sum())
            answers.append(RowAnswer(row.where, row.text, "", False, True, float(nats.mean())))
        written = runner.generate([row.prompt for row in some], max_new_tokens=most, stop_ids=tokenizer.stop_ids)
        for number, ids in enumerate(written, start):
            answers[number] = _answered(answers[number], tokenizer.decode(ids).strip(), ids[-1] in tokenizer.stop_ids)
        how.on_progress(Progress("measure", len(answers), len(rows), "clips"))
    return _summary(how.metric, rows, answers, hits), answers


def error_percents(expected: Sequence[str], answers: Sequence[str]) -> tuple[float, float]:
    """Of words and of characters: substitutions, insertions and deletions over what was said, on normalized texts, percent.

    Rows where nothing is left of the expected text are left out.
    """
    import jiwer

    pairs = [(normalized(said), normalized(written)) for said, written in zip(expected, answers, strict=True)]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        return 0.0, 0.0
    said, written = (list(texts) for texts in zip(*pairs, strict=True))
    return 100 * jiwer.wer(said, written), 100 * jiwer.cer(said, written)


def _answered(row: RowAnswer, text: str, ended: bool) -> RowAnswer:
    right = normalized(text) == normalized(row.expected)
    return RowAnswer(row.where, row.expected, text, right, ended, row.loss)


def _summary(metric: str, rows: Sequence[Pair], answers: Sequence[RowAnswer], hits: int) -> Quality:
    words, characters = error_percents([a.expected for a in answers], [a.answer for a in answers])
    targets = sum(row.targets for row in rows)
    loss = sum(a.loss * row.targets for a, row in zip(answers, rows, strict=True)) / targets
    accuracy = 100 * sum(a.right for a in answers) / len(answers)
    headline = "wer" if metric == "auto" else metric
    return Quality(
        headline,
        {"wer": words, "cer": characters, "accuracy": accuracy}[headline],
        loss,
        len(rows),
        targets,
        token_accuracy_percent=100 * hits / targets,
        accuracy_percent=accuracy,
        ended_percent=100 * sum(a.ended for a in answers) / len(answers),
        word_error_percent=words,
        character_error_percent=characters,
    )
