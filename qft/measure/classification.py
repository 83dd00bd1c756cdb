"""How good a classifier is on held-out rows, how far its probabilities can be trusted, and when it should rather not answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qft.bundle.classifier import Labels
from qft.data.labelled import Labelled
from qft.measure.agreement import log_softmax
from qft.measure.quality import Measuring, Quality, RowAnswer, batches
from qft.progress import OnProgress, Progress, silent

_BINS = 15  # of the expected calibration error, as in arXiv 1706.04599


class Classifier(Protocol):
    """A model that can be measured: float32 logits (rows, 1, labels)."""

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Calibration:
    """How a shipped classifier's probabilities are made honest, and what that came to on the test rows.

    temperature: divides the logits (arXiv 1706.04599). threshold: answers less probable are given as unsure. Percentages:
    expected calibration error before and after; rows that are answered, and those of them that are right.
    """

    temperature: float
    threshold: float
    error_before_percent: float
    error_percent: float
    accepted_percent: float
    accepted_right_percent: float | None


def measure_labels(
    runner: Classifier,
    rows: Sequence[Labelled],
    labels: Labels,
    how: Measuring,
) -> tuple[Quality, list[RowAnswer]]:
    """Measure every row, by accuracy (with several labels: the set exactly right) or macro_f1."""
    logits = all_logits(runner, rows, batch_size=how.batch_size, on_progress=how.on_progress)
    answers = []
    for number, (row, values) in enumerate(zip(rows, logits, strict=True)):
        if how.witness is not None:
            # With several labels each is a choice of its own, between it and nothing.
            how.witness.look(number, np.stack([np.zeros_like(values), values], -1) if labels.several else values[None])
        answer, probability = labels.decide(values)
        expected, nats = labels.named(row), _nats(values, row, several=labels.several)
        answers.append(RowAnswer(row.where, expected, answer, answer == expected, True, nats, probability))
    accuracy = 100 * float(np.mean([a.right for a in answers]))
    scores = per_label(answers, labels)
    f1 = float(np.mean([score.f1_percent for score in scores])) if scores else 0.0
    headline = ("macro_f1" if labels.several else "accuracy") if how.metric == "auto" else how.metric
    return Quality(
        headline,
        f1 if headline == "macro_f1" else accuracy,
        float(np.mean([a.loss for a in answers])),
        len(rows),
        len(rows),
        accuracy_percent=accuracy,
        macro_f1_percent=f1,
        calibration_error_percent=calibration_error(
            [a.probability or 0.0 for a in answers], [a.right for a in answers]
        ),
    ), answers


def all_logits(
    runner: Classifier, rows: Sequence[Labelled], *, batch_size: int, on_progress: OnProgress = silent
) -> np.ndarray:
    """float32 (rows, labels), in the order of the rows."""
    found: dict[int, np.ndarray] = {}
    for batch in batches([len(r.input_ids) for r in rows], batch_size):
        found |= zip(batch, runner.logits([rows[i].input_ids for i in batch], 1)[:, 0], strict=True)
        on_progress(Progress("measure", len(found), len(rows), "rows"))
    return np.stack([found[number] for number in range(len(rows))])


@dataclass(frozen=True)
class LabelScore:
    """One label: of the rows that have it how many were found, of those named so how many have it, their harmonic mean."""

    label: str
    rows: int
    precision_percent: float
    recall_percent: float
    f1_percent: float


def per_label(answers: Sequence[RowAnswer], labels: Labels) -> list[LabelScore]:
    """Every label that some row has or some answer names, in the labels' order."""
    from sklearn.metrics import precision_recall_fscore_support

    truth, said = labels.sets([a.expected for a in answers]), labels.sets([a.answer for a in answers])
    shown = (truth | said).any(0)
    found = precision_recall_fscore_support(truth, said, average=None, zero_division=0)
    return [
        LabelScore(name, int(rows), 100 * float(precision), 100 * float(recall), 100 * float(f1))
        for name, precision, recall, f1, rows, is_shown in zip(labels.names, *found, shown, strict=True)
        if is_shown
    ]


def calibration_error(probabilities: Sequence[float], right: Sequence[bool]) -> float:
    """Expected calibration error, percent: |share right − mean probability| over bins of probability, weighed by rows."""
    p, hits = np.array(probabilities), np.array(right, dtype=float)
    places = np.minimum((p * _BINS).astype(int), _BINS - 1)
    gaps = [abs(hits[places == b].sum() - p[places == b].sum()) for b in range(_BINS)]
    return 100 * float(sum(gaps)) / len(p)


def calibrate(
    runner: Classifier,
    validation: Sequence[Labelled],
    test: Sequence[Labelled],
    labels: Labels,
    *,
    accepted_accuracy: float,
    batch_size: int,
) -> Calibration:
    """Temperature and threshold from the validation rows, judged on the test rows."""
    logits = all_logits(runner, validation, batch_size=batch_size)
    temperature = best_temperature(logits, validation, several=labels.several)
    threshold = reject_threshold(*_decided(logits, validation, labels, temperature), accepted_accuracy)
    logits = all_logits(runner, test, batch_size=batch_size)
    before, right = _decided(logits, test, labels, 1.0)
    after, _ = _decided(logits, test, labels, temperature)
    accepted = [hit for p, hit in zip(after, right, strict=True) if p >= threshold]
    return Calibration(
        temperature,
        threshold,
        calibration_error(before, right),
        calibration_error(after, right),
        100 * len(accepted) / len(test),
        100 * sum(accepted) / len(accepted) if accepted else None,
    )


def best_temperature(logits: np.ndarray, rows: Sequence[Labelled], *, several: bool) -> float:
    """The divisor of the logits, between 1/8 and 8, that makes the rows likeliest."""
    from scipy.optimize import minimize_scalar

    def nats(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean([_nats(values, row, several=several) for values, row in zip(scaled, rows, strict=True)]))

    found = minimize_scalar(nats, bounds=(-np.log(8), np.log(8)), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def reject_threshold(probabilities: Sequence[float], right: Sequence[bool], accepted_accuracy: float) -> float:
    """The least probability such that at least this share of the answers as probable or more is right; 0 if all may stand.

    Where no threshold does it, one above the most probable answer: everything is unsure.
    """
    order = np.argsort(-np.array(probabilities), kind="stable")
    p, hits = np.array(probabilities)[order], np.array(right, dtype=float)[order]
    share = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    # Answers of one probability stand or fall together: only the last of them is a place to cut.
    good = [n for n in range(len(p)) if share[n] >= accepted_accuracy and (n + 1 == len(p) or p[n + 1] < p[n])]
    if not good:
        return float(np.nextafter(p[0], 2))
    return 0.0 if good[-1] + 1 == len(p) else float(p[good[-1]])


def _decided(
    logits: np.ndarray, rows: Sequence[Labelled], labels: Labels, temperature: float
) -> tuple[list[float], list[bool]]:
    decided = [labels.decide(values, temperature) for values in logits]
    right = [answer == labels.named(row) for (answer, _), row in zip(decided, rows, strict=True)]
    return [probability for _, probability in decided], right


def _nats(logits: np.ndarray, row: Labelled, *, several: bool) -> float:
    """Cross entropy of a row; with several labels summed over them."""
    values = logits.astype(np.float64)
    if not several:
        return float(-log_softmax(values)[row.labels[0]])
    signs = np.full(len(values), -1.0)
    signs[list(row.labels)] = 1.0
    return float(np.logaddexp(0, -signs * values).sum())
