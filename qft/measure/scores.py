"""A metric out of sums over rows: the same figure as was measured, of any part of the rows, or of rows drawn again. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qft.bundle.classifier import Labels
from qft.data.conversations import read_calls
from qft.measure.english import normalized
from qft.measure.quality import RowAnswer
from qft.measure.tool_calls import same_calls
from qft.measure.translations import language_of, words_of

_MAX_ORDER = 4  # of BLEU's n-grams
_CHRF_ORDER, _CHRF_BETA = 6, 2  # of chrF's, which are of characters; how much more recall weighs than precision
_DRAWS = 2000


@dataclass(frozen=True)
class Score:
    """A metric over rows. sums: float64 (rows, k), what every row adds; value: sums (…, k) → the metric (…), NaN of no rows."""

    sums: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]

    def of(self, rows: Sequence[int] | None = None) -> float:
        """The metric of some rows, by number; of all by default."""
        return float(self.value((self.sums if rows is None else self.sums[list(rows)]).sum(0)))

    def interval(self, rows: Sequence[int]) -> tuple[float, float]:
        """The 95 % percentile interval of the metric of some rows, over 2,000 draws of as many of them."""
        found = self.value(_draws(len(rows)) @ self.sums[list(rows)])
        low, high = np.nanpercentile(found, [2.5, 97.5]) if np.isfinite(found).any() else (np.nan, np.nan)
        return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """How a metric of two models on the same rows differs, second less first, and the 95 % interval of that."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval is on one side of nothing."""
        return not self.low <= 0 <= self.high


def score_of(metric: str, answers: Sequence[RowAnswer], labels: Labels | None = None) -> Score | None:
    """How a task's metric (or `loss`) comes about, row by row.

    labels: those that macro F1 is of. Values are in the metric's own unit: percent, nats, BLEU's and chrF's 0 to 100.
    """
    if metric == "macro_f1":
        return None if labels is None else _macro_f1(answers, labels)
    if metric in ("bleu", "chrf"):
        return _bleu(answers) if metric == "bleu" else _chrf(answers)
    found = _RATIOS.get(metric)
    if found is None:
        return None
    pairs, unit = found
    return Score(np.array([pairs(answer) for answer in answers], dtype=np.float64).reshape(-1, 2), unit)


def difference(first: Score, second: Score) -> Difference:
    """Of two models' scores on the same rows in the same order: both are asked about the same 2,000 draws of rows.

    The paired bootstrap of Koehn (EMNLP 2004); percentile interval.
    """
    draws = _draws(len(first.sums))
    apart = second.value(draws @ second.sums) - first.value(draws @ first.sums)
    low, high = np.nanpercentile(apart, [2.5, 97.5])
    return Difference(second.of() - first.of(), float(low), float(high))


def _draws(rows: int) -> np.ndarray:
    """float64 (draws, rows): how often each draw has each row; the same whenever asked."""
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=_DRAWS).astype(np.float64)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100 * _ratio(sums)


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(_ratio(sums), 80.0))


def _right(answer: RowAnswer) -> tuple[float, float]:
    return float(answer.asked and answer.right), float(answer.asked)


def _f1(answer: RowAnswer) -> tuple[float, float]:
    return (0.0, 0.0) if answer.f1 is None else (answer.f1, 1.0)


def _nats(answer: RowAnswer) -> tuple[float, float]:
    return answer.loss * answer.targets, float(answer.targets)


def _call(answer: RowAnswer) -> tuple[float, float]:
    expected = read_calls(answer.expected) if answer.asked else None
    return (float(same_calls(read_calls(answer.answer), expected)), 1.0) if expected else (0.0, 0.0)


def _found_among(most: int) -> Callable[[RowAnswer], tuple[float, float]]:
    return lambda answer: (0.0, 0.0) if answer.rank is None else (float(answer.rank <= most), 1.0)


def _inverse_rank(answer: RowAnswer) -> tuple[float, float]:
    return (0.0, 0.0) if answer.rank is None else (1 / answer.rank, 1.0)


def _words_wrong(answer: RowAnswer) -> tuple[float, float]:
    import jiwer

    said, written = normalized(answer.expected), normalized(answer.answer)
    return _errors(jiwer.process_words(said, written)) if said else (0.0, 0.0)


def _characters_wrong(answer: RowAnswer) -> tuple[float, float]:
    import jiwer

    said, written = normalized(answer.expected), normalized(answer.answer)
    return _errors(jiwer.process_characters(said, written)) if said else (0.0, 0.0)


def _errors(found: object) -> tuple[float, float]:
    """Of jiwer's counts: those that are wrong, and those that were said."""
    hits, changed, left_out, put_in = (
        getattr(found, name) for name in ("hits", "substitutions", "deletions", "insertions")
    )
    return float(changed + left_out + put_in), float(hits + changed + left_out)


_RATIOS: dict[str, tuple[Callable[[RowAnswer], tuple[float, float]], Callable[[np.ndarray], np.ndarray]]] = {
    "accuracy": (_right, _percent),
    "exact_match": (_right, _percent),
    "f1": (_f1, _percent),
    "tool_call": (_call, _percent),
    "wer": (_words_wrong, _percent),
    "cer": (_characters_wrong, _percent),
    "recall@1": (_found_among(1), _percent),
    "recall@5": (_found_among(5), _percent),
    "recall@10": (_found_among(10), _percent),
    "mrr": (_inverse_rank, _percent),
    "perplexity": (_nats, _perplexity),
    "loss": (_nats, _ratio),
}


def _macro_f1(answers: Sequence[RowAnswer], labels: Labels) -> Score:
    """A row adds, label by label, whether it was found, wrongly named, missed; F1 of labels that occur, averaged."""
    truth = labels.sets([answer.expected for answer in answers])
    said = labels.sets([answer.answer for answer in answers])

    def value(sums: np.ndarray) -> np.ndarray:
        found, wrong, missed = np.split(sums, 3, axis=-1)
        counted = 2 * found + wrong + missed
        f1 = np.divide(2 * found, counted, out=np.zeros_like(found), where=counted > 0)
        return np.asarray(100 * f1.sum(-1) / np.maximum(1, (counted > 0).sum(-1)))

    return Score(np.concatenate([truth & said, said & ~truth & 1, truth & ~said & 1], axis=1).astype(np.float64), value)


def _bleu(answers: Sequence[RowAnswer]) -> Score:
    """A row adds its matching and possible n-grams and both lengths."""
    from sacrebleu.metrics import BLEU

    expected = [answer.expected if answer.asked else "" for answer in answers]
    asked = [number for number, answer in enumerate(answers) if answer.asked]
    metric = BLEU(tokenize=words_of(language_of([expected[number] for number in asked])), effective_order=True)
    sums = np.zeros((len(answers), 2 * _MAX_ORDER + 2))
    for number in asked:
        found = metric.sentence_score(answers[number].answer, [expected[number]])
        sums[number] = [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def value(sums: np.ndarray) -> np.ndarray:
        flat = [
            BLEU.compute_bleu(
                correct=[int(n) for n in row[:_MAX_ORDER]],
                total=[int(n) for n in row[_MAX_ORDER:-2]],
                sys_len=int(row[-2]),
                ref_len=int(row[-1]),
                smooth_method="exp",
            ).score
            for row in sums.reshape(-1, sums.shape[-1])
        ]
        return np.array(flat).reshape(sums.shape[:-1])

    return Score(sums, value)


def _chrf(answers: Sequence[RowAnswer]) -> Score:
    """A row adds, for every length of n-gram, those it has, those expected, and those in both.

    chrF2 of Popović (WMT 2015) as sacrebleu 2 counts it: without white space; a length that either side has no n-gram of is left out.
    """
    counts = [_shared_ngrams(answer) if answer.asked else [0] * 3 * _CHRF_ORDER for answer in answers]

    def value(sums: np.ndarray) -> np.ndarray:
        said, expected, both = np.moveaxis(sums.reshape(*sums.shape[:-1], _CHRF_ORDER, 3), -1, 0)
        there = (said > 0) & (expected > 0)
        lengths = np.maximum(1, there.sum(-1))
        precision, recall = (
            np.divide(both, of, out=np.zeros_like(both), where=there).sum(-1) / lengths for of in (said, expected)
        )
        weight, divisor = _CHRF_BETA**2, _CHRF_BETA**2 * precision + recall
        shared = np.divide((1 + weight) * precision * recall, divisor, out=np.zeros_like(divisor), where=divisor > 0)
        return np.asarray(100 * shared)

    return Score(np.array(counts, dtype=np.float64).reshape(len(answers), -1), value)


def _shared_ngrams(answer: RowAnswer) -> list[int]:
    said, expected = ("".join(text.split()) for text in (answer.answer, answer.expected))
    found = []
    for length in range(1, _CHRF_ORDER + 1):
        ours, theirs = (
            Counter(text[i : i + length] for i in range(len(text) - length + 1)) for text in (said, expected)
        )
        found += [ours.total(), theirs.total(), (ours & theirs).total()]
    return found
