"""How well speech is written down: word and character error rates of greedy transcripts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qft.bundle.seq2seq import Seq2SeqRunner
from qft.data.sequences import Pair
from qft.data.tokenizer import TextTokenizer
from qft.measure.english import normalized
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.measure.written import write_all


def measure_transcripts(
    runner: Seq2SeqRunner, rows: Sequence[Pair], tokenizer: TextTokenizer, how: Measuring
) -> tuple[Quality, list[RowAnswer]]:
    """Measure every row: loss of the expected text, and what is written, right if nothing but its form differs."""
    written = write_all(runner, rows, tokenizer, how, unit="clips")
    answers = [replace(a, right=normalized(a.answer) == normalized(a.expected)) for a in written.answers]
    words, characters = error_percents([a.expected for a in answers], [a.answer for a in answers])
    accuracy = 100 * sum(a.right for a in answers) / len(answers)
    headline = "wer" if how.metric == "auto" else how.metric
    quality = Quality(
        headline,
        {"wer": words, "cer": characters, "accuracy": accuracy}[headline],
        written.loss,
        len(rows),
        written.targets,
        token_accuracy_percent=written.hits_percent,
        accuracy_percent=accuracy,
        ended_percent=100 * sum(a.ended for a in answers) / len(answers),
        word_error_percent=words,
        character_error_percent=characters,
    )
    return quality, answers


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
