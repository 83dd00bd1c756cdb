"""How good a model that writes is on held-out rows: one measure for torch and for onnxruntime. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qft.data.encode import Encoded
from qft.data.tokenizer import TextTokenizer
from qft.measure.agreement import Agreement
from qft.progress import OnProgress, Progress, silent

_MOST_TOKENS = 4096  # padded tokens of one forward pass
_MOST_LOGITS = 200_000_000  # of one forward pass, 0.8 GB: an ONNX decoder gives those of every position, needed or not


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
    """One held-out row: what was expected, what was answered, its mean loss a target (nats).

    ended: by the model itself. probability: that it gives its answer, where it chooses among labels. asked: False if only
    its loss was taken; answer, right and ended then mean nothing.
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


@dataclass(frozen=True)
class Quality:
    """metric is the headline; loss in nats a target. Percentages are of rows; None where a figure has no meaning.

    perplexity and token_accuracy_percent (targets that are the first choice): of models that write. accuracy_percent:
    answers exactly right, of rows with labels. label_percent: generated answers that are exactly one of the labels.
    ended_percent: those that the model ended by itself. preferred_percent: rows where the right label's first token is
    likelier than the other labels' (None if labels begin alike). macro_f1_percent, calibration_error_percent: see
    `classification`; word_error_percent, character_error_percent: see `transcripts`. exact_match_percent: questions answered
    with the words of a right answer; f1_percent: see `answers`. bleu, chrf: of translations, with sacrebleu's signatures of both.
    agreement: with the tuned model, where there is one.
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
    bleu: float | None = None
    chrf: float | None = None
    signatures: tuple[str, ...] = ()
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Measuring:
    """How rows are measured. metric: a task's metric, or auto for its usual one. batch_size: rows of one forward pass.

    extra_tokens: that a generated answer may be longer than the longest expected one. witness: sees all logits.
    """

    metric: str
    batch_size: int
    extra_tokens: int
    witness: Witness | None = None
    on_progress: OnProgress = silent


def higher_is_better(metric: str) -> bool:
    """The good direction of a headline metric."""
    return metric not in ("perplexity", "wer", "cer")


def in_percent(metric: str) -> bool:
    """Whether a headline metric is a share; others are figures of their own."""
    return metric not in ("perplexity", "bleu", "chrf")


def measure(
    runner: Runner,
    rows: Sequence[Encoded],
    tokenizer: TextTokenizer,
    how: Measuring,
) -> tuple[Quality, list[RowAnswer]]:
    """Measure every row, by accuracy or perplexity (auto: accuracy if rows have labels).

    One teacher-forced pass gives each row's loss and tells whether greedy generation would give the expected answer
    token for token; only rows where it would not are generated, to see what is answered instead. Rows without labels are
    not generated: many answers are as good as the expected one.
    """
    labels = sorted({r.label for r in rows if r.label is not None})
    first = _first_tokens(rows, labels)
    most_tokens = min(_MOST_TOKENS, _MOST_LOGITS // tokenizer.vocab_size)
    forced: list[_Forced] = [_Forced(0.0, 0, False, None)] * len(rows)
    done = 0
    for batch in batches([len(r.input_ids) for r in rows], how.batch_size, most_tokens):
        for index, (result, logits) in zip(
            batch, _teacher_forced(runner, [rows[i] for i in batch], first), strict=True
        ):
            forced[index] = result
            if how.witness is not None:
                how.witness.look(index, logits)
        done += len(batch)
        how.on_progress(Progress("measure", done, len(rows), "rows"))
    if labels:
        answers = _answers(runner, rows, forced, tokenizer, how, most_tokens)
        return _summary(how.metric, rows, forced, answers, labels), answers
    losses = [
        RowAnswer(
            r.where, _expected(r, tokenizer), "", False, False, f.nats / r.targets, targets=r.targets, asked=False
        )
        for r, f in zip(rows, forced, strict=True)
    ]
    return _summary(how.metric, rows, forced, [], labels), losses


def _expected(row: Encoded, tokenizer: TextTokenizer) -> str:
    return tokenizer.decode([token for token, flag in zip(row.input_ids, row.in_loss, strict=True) if flag])


def batches(lengths: Sequence[int], batch_size: int, most_tokens: int = _MOST_TOKENS) -> Iterator[list[int]]:
    """Row numbers by length, at most `batch_size` rows and `most_tokens` padded tokens at a time, but at least one row."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[index] > most_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Forced:
    nats: float  # summed over targets
    hits: int  # targets that are the first choice
    whole_answer: bool  # greedy generation gives the expected answer
    preferred: str | None


def _first_tokens(rows: Sequence[Encoded], labels: Sequence[str]) -> dict[str, int]:
    """label → its answer's first token; empty if two labels begin with the same token."""
    found = {r.label: r.answer[0] for r in rows if r.label is not None and r.answer}
    return found if len(set(found.values())) == len(labels) else {}


def _teacher_forced(
    runner: Runner, rows: Sequence[Encoded], first: dict[str, int]
) -> Iterator[tuple[_Forced, np.ndarray]]:
    """Of each row, also the logits (targets, vocabulary)."""
    ends = [len(r.in_loss) - r.in_loss[::-1].index(True) for r in rows]
    spans = [end - min(r.first_target, r.answer_start) for r, end in zip(rows, ends, strict=True)]
    keep = max(spans)
    logits = runner.logits([r.input_ids[: end - 1] for r, end in zip(rows, ends, strict=True)], keep)
    keep = logits.shape[1]
    for row, end, values in zip(rows, ends, logits, strict=True):
        begin = min(row.first_target, row.answer_start)
        part = values[keep - (end - begin) :]
        targets, flags = np.array(row.input_ids[begin:end]), np.array(row.in_loss[begin:end])
        top = part.max(-1)
        nats = top + np.log(np.exp(part - top[:, None]).sum(-1)) - part[np.arange(len(targets)), targets]
        hits = part.argmax(-1) == targets
        at = row.answer_start - begin
        preferred = max(first, key=lambda label: part[at, first[label]]) if first else None
        yield _Forced(float(nats[flags].sum()), int(hits[flags].sum()), bool(hits[at:].all()), preferred), part[flags]


def _answers(
    runner: Runner,
    rows: Sequence[Encoded],
    forced: Sequence[_Forced],
    tokenizer: TextTokenizer,
    how: Measuring,
    most_tokens: int,
) -> list[RowAnswer]:
    longest = max(len(r.answer) for r in rows)
    open_rows = [i for i, f in enumerate(forced) if not f.whole_answer]
    texts: dict[int, tuple[str, bool]] = {}
    for batch in batches([len(rows[i].prompt) for i in open_rows], how.batch_size, most_tokens):
        chosen = [open_rows[b] for b in batch]
        out = runner.generate(
            [rows[i].prompt for i in chosen], max_new_tokens=longest + how.extra_tokens, stop_ids=tokenizer.stop_ids
        )
        for index, ids in zip(chosen, out, strict=True):
            texts[index] = (tokenizer.decode(ids), ids[-1] in tokenizer.stop_ids)
        how.on_progress(Progress("generate", len(texts), len(open_rows), "answers"))
    answers = []
    for index, (row, result) in enumerate(zip(rows, forced, strict=True)):
        expected = row.label or ""
        text, ended = texts.get(index, (expected, True))
        loss = result.nats / row.targets
        answers.append(RowAnswer(row.where, expected, text, text == expected, ended, loss, targets=row.targets))
    return answers


def _summary(
    metric: str, rows: Sequence[Encoded], forced: Sequence[_Forced], answers: Sequence[RowAnswer], labels: Sequence[str]
) -> Quality:
    targets = sum(r.targets for r in rows)
    loss = sum(f.nats for f in forced) / targets
    perplexity = float(np.exp(min(loss, 80.0)))

    def percent(flags: Sequence[bool]) -> float:
        return 100 * sum(flags) / len(flags)

    preferred = [f.preferred == r.label for f, r in zip(forced, rows, strict=True)]
    accuracy = percent([a.right for a in answers]) if answers else None
    headline = ("accuracy" if answers else "perplexity") if metric == "auto" else metric
    token_accuracy = 100 * sum(f.hits for f in forced) / targets
    value = perplexity if headline == "perplexity" else accuracy if accuracy is not None else token_accuracy
    return Quality(
        headline,
        value,
        loss,
        len(rows),
        targets,
        perplexity=perplexity,
        token_accuracy_percent=token_accuracy,
        accuracy_percent=accuracy,
        label_percent=percent([a.answer in labels for a in answers]) if answers else None,
        ended_percent=percent([a.ended for a in answers]) if answers else None,
        preferred_percent=percent(preferred) if answers and forced[0].preferred is not None else None,
    )
