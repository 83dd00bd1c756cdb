"""What is measured of a model on held-out rows, and how: the same for torch and for onnxruntime, for every task. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qft.measure.agreement import Agreement
from qft.measure.tool_calls import ToolCalls
from qft.progress import OnProgress, silent

MOST_TOKENS = 4096  # padded tokens of one forward pass


class Runner(Protocol):
    """A model that can be measured."""

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray: ...

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]: ...


class Witness(Protocol):
    """Who looks at the logits, (targets, vocabulary), of every held-out row as it is measured."""

    def look(self, row: int, logits: np.ndarray) -> None: ...


@dataclass(frozen=True)
class RowAnswer:
    """One held-out row, or one answer of a conversation: what was expected, what was answered, its mean loss a target (nats).

    ended: by the model itself. probability: that it gives its answer, where it chooses among labels. asked: False if only
    its loss was taken; answer, right and ended then mean nothing. f1: 0 to 1, of the words it shares with what was expected, where
    answers are compared so. rank: from 1, of the first right one among what was found, where texts are looked for.
    """

    where: str
    expected: str
    answer: str
    right: bool
    ended: bool
    loss: float
    probability: float | None = None
    targets: int = 1
    asked: bool = True
    f1: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Retrieval:
    """Percent of rows with something right among the first 1, 5, 10 found; mrr: 100 times the mean of 1 over its rank."""

    recall_1_percent: float
    recall_5_percent: float
    recall_10_percent: float
    mrr: float

    def named(self, metric: str) -> float:
        """recall@1, recall@5, recall@10 or mrr."""
        return self.mrr if metric == "mrr" else float(getattr(self, f"recall_{metric.removeprefix('recall@')}_percent"))


@dataclass(frozen=True)
class Quality:
    """metric is the headline; loss in nats a target. Percentages are of rows; None where a figure has no meaning.

    perplexity and token_accuracy_percent (targets that are the first choice): of models that write. accuracy_percent:
    answers exactly right, of rows with labels. label_percent: generated answers that are exactly one of the labels.
    ended_percent: those that the model ended by itself. written: how many answers were written, where rows have no labels.
    preferred_percent: rows where the right label's first token is likelier than the other labels' (None if labels begin
    alike). macro_f1_percent, calibration_error_percent: see `classification`; word_error_percent, character_error_percent:
    see `transcripts`. exact_match_percent: answers with the words of a right one, or equal calls; f1_percent: see `answers`.
    tool_calls: where some answers that were written should be calls. retrieval: where texts are looked for. bleu, chrf: of
    translations, with sacrebleu's signatures of both. agreement: with the tuned model, where there is one.
    """

    metric: str
    value: float
    loss: float
    rows: int
    targets: int
    perplexity: float | None = None
    token_accuracy_percent: float | None = None
    accuracy_percent: float | None = None
    label_percent: float | None = None
    ended_percent: float | None = None
    preferred_percent: float | None = None
    macro_f1_percent: float | None = None
    word_error_percent: float | None = None
    character_error_percent: float | None = None
    calibration_error_percent: float | None = None
    exact_match_percent: float | None = None
    f1_percent: float | None = None
    written: int | None = None
    tool_calls: ToolCalls | None = None
    retrieval: Retrieval | None = None
    bleu: float | None = None
    chrf: float | None = None
    signatures: tuple[str, ...] = ()
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Measuring:
    """How rows are measured. metric: a task's metric, or auto for its usual one. batch_size: rows of one forward pass.

    extra_tokens: that a generated answer may be longer than the longest expected one. answers, longest_answer: of models that
    write, how many answers to rows without labels, expected to be of at most so many tokens. witness: sees all logits.
    """

    metric: str
    batch_size: int
    extra_tokens: int
    witness: Witness | None = None
    on_progress: OnProgress = silent
    answers: int = 0
    longest_answer: int = 0


def higher_is_better(metric: str) -> bool:
    """The good direction of a headline metric."""
    return metric not in ("perplexity", "wer", "cer")


def in_percent(metric: str) -> bool:
    """Whether a headline metric is a share; others are figures of their own."""
    return metric not in ("perplexity", "bleu", "chrf")


def batches(lengths: Sequence[int], batch_size: int, most_tokens: int = MOST_TOKENS) -> Iterator[list[int]]:
    """Row numbers by length, at most `batch_size` rows and `most_tokens` padded tokens at a time, but at least one row."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[index] > most_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
