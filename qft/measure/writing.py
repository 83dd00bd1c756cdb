"""How good a model that writes is: loss of every held-out row, and what it answers instead of what it should. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qft.data.conversations import read_calls
from qft.data.encode import Encoded
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.measure.agreement import pieces
from qft.measure.answers import exact_match, f1
from qft.measure.quality import MOST_TOKENS, Measuring, Quality, RowAnswer, Runner, batches
from qft.measure.tool_calls import count_calls, same_calls
from qft.measure.translations import TranslationScores
from qft.progress import Progress

_MOST_LOGITS = (
    200_000_000  # of one forward pass, 0.8 GB: an ONNX decoder that is not fused gives those of every position
)
_MOST_WANTED = 50_000_000  # of those that are asked for


@dataclass(frozen=True)
class Turn:
    """An answer of a held-out row: its number and the row's, and the places of its first token and of what follows its last."""

    row: int
    number: int
    begin: int
    end: int


def turns_of(rows: Sequence[Encoded]) -> list[Turn]:
    """What `measure` gives an answer to: every turn in the loss; of rows with labels the last one, which is the label."""
    turns = []
    for row, encoded in enumerate(rows):
        found = list(enumerate(encoded.answers))
        turns += [Turn(row, number, *span) for number, span in (found if encoded.label is None else found[-1:])]
    return turns


def measure(
    runner: Runner, rows: Sequence[Encoded], tokenizer: TextTokenizer, how: Measuring
) -> tuple[Quality, list[RowAnswer]]:
    """Measure every row, and write answers: all where rows have labels, otherwise `how.answers` of them.

    One teacher-forced pass gives each row's loss and tells whether greedy generation would give the expected answer token
    for token; only answers where it would not are generated. Without labels, answers are chosen by a hash, among those
    that should end within `how.longest_answer` tokens: a model that does not end them goes on too long. Plain text is
    not answered. Raises InputError if nothing was asked that the headline metric is of.
    """
    labels = sorted({r.label for r in rows if r.label is not None})
    most_tokens = min(MOST_TOKENS, _MOST_LOGITS // tokenizer.vocab_size)
    forced = _all_forced(runner, rows, labels, how, most_tokens, tokenizer.vocab_size)
    turns = turns_of(rows)
    asked = turns if labels else _chosen(rows, turns, how, tokenizer)
    said = _said(runner, rows, asked, forced, tokenizer, how, most_tokens)
    answers = [_answer(turn, rows[turn.row], forced[turn.row], said.get(turn), tokenizer) for turn in turns]
    written = [answer for answer in answers if answer.asked]
    return _summary(how.metric, rows, forced, written, labels), answers


@dataclass(frozen=True)
class _Forced:
    nats: np.ndarray  # float64, of every target
    hits: np.ndarray  # bool, whether it is the first choice
    places: np.ndarray  # where it stands in the row
    preferred: str | None

    def of(self, turn: Turn) -> np.ndarray:
        """Which targets are the turn's."""
        return (self.places >= turn.begin) & (self.places < turn.end)


def _all_forced(
    runner: Runner, rows: Sequence[Encoded], labels: Sequence[str], how: Measuring, most_tokens: int, vocabulary: int
) -> list[_Forced]:
    first = _first_tokens(rows, labels)
    forced: dict[int, _Forced] = {}
    for batch in _few_wanted(rows, batches([len(r.input_ids) for r in rows], how.batch_size, most_tokens), vocabulary):
        for index, (result, logits) in zip(
            batch, _teacher_forced(runner, [rows[i] for i in batch], first), strict=True
        ):
            forced[index] = result
            if how.witness is not None:
                how.witness.look(index, logits)
        how.on_progress(Progress("measure", len(forced), len(rows), "rows"))
    return [forced[index] for index in range(len(rows))]


def _few_wanted(rows: Sequence[Encoded], batches: Iterable[list[int]], vocabulary: int) -> Iterator[list[int]]:
    """Batches of row numbers, cut where logits of too many positions would be asked for at once."""
    for batch in batches:
        longest = max(len(rows[i].input_ids) - min(rows[i].first_target, rows[i].answer_start) for i in batch)
        together = max(1, _MOST_WANTED // (longest * vocabulary))
        yield from (batch[start : start + together] for start in range(0, len(batch), together))


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
    logits = runner.logits([r.input_ids[: end - 1] for r, end in zip(rows, ends, strict=True)], max(spans))
    keep = logits.shape[1]
    for row, end, values in zip(rows, ends, logits, strict=True):
        begin = min(row.first_target, row.answer_start)
        part = values[keep - (end - begin) :]
        targets, flags = np.array(row.input_ids[begin:end]), np.array(row.in_loss[begin:end])
        nats, hits = _nats_and_hits(part, targets)
        at = row.answer_start - begin
        preferred = max(first, key=lambda label: part[at, first[label]]) if first else None
        places = begin + flags.nonzero()[0]
        yield (
            _Forced(nats[flags].astype(np.float64), hits[flags], places, preferred),
            part if flags.all() else part[flags],
        )


def _nats_and_hits(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every position: minus the log of its target's share, float32, and whether that is the first choice."""
    nats, hits = [], []
    for some, wanted in zip(pieces(logits), pieces(targets), strict=True):
        top = some.max(-1)
        nats.append(top + np.log(np.exp(some - top[:, None]).sum(-1)) - some[np.arange(len(wanted)), wanted])
        hits.append(some.argmax(-1) == wanted)
    return np.concatenate(nats), np.concatenate(hits)


def _chosen(rows: Sequence[Encoded], turns: Sequence[Turn], how: Measuring, tokenizer: TextTokenizer) -> list[Turn]:
    """Turns to be written; the same ones whatever the model."""

    def mark(turn: Turn) -> str:
        return hashlib.sha256(repr(rows[turn.row].input_ids[: turn.end]).encode()).hexdigest()

    fitting = [
        turn
        for turn in turns
        if rows[turn.row].answer_start > 1  # plain text
        and turn.end - turn.begin <= how.longest_answer
        and rows[turn.row].input_ids[turn.end - 1] in tokenizer.stop_ids  # not cut by max_length
    ]
    return sorted(fitting, key=mark)[: how.answers]


def _said(
    runner: Runner,
    rows: Sequence[Encoded],
    asked: Sequence[Turn],
    forced: Sequence[_Forced],
    tokenizer: TextTokenizer,
    how: Measuring,
    most_tokens: int,
) -> dict[Turn, tuple[str, bool]]:
    """The answer to each turn and whether the model ended it; the expected one where greedy generation would give it."""
    if not asked:
        return {}
    longest = max(turn.end - turn.begin for turn in asked)
    said = {turn: (expected_text(rows[turn.row], turn, tokenizer), True) for turn in asked}
    unsure = [turn for turn in asked if not forced[turn.row].hits[forced[turn.row].of(turn)].all()]
    done = 0
    for batch in batches([turn.begin for turn in unsure], how.batch_size, most_tokens):
        chosen = [unsure[b] for b in batch]
        out = runner.generate(
            [rows[turn.row].input_ids[: turn.begin] for turn in chosen],
            max_new_tokens=longest + how.extra_tokens,
            stop_ids=tokenizer.stop_ids,
        )
        for turn, ids in zip(chosen, out, strict=True):
            said[turn] = (tokenizer.decode(ids), ids[-1] in tokenizer.stop_ids)
        done += len(chosen)
        how.on_progress(Progress("generate", done, len(unsure), "answers"))
    return said


def expected_text(row: Encoded, turn: Turn, tokenizer: TextTokenizer) -> str:
    """The text that a turn should have."""
    return row.label if row.label is not None else tokenizer.decode(row.input_ids[turn.begin : turn.end])


def _answer(
    turn: Turn, row: Encoded, forced: _Forced, said: tuple[str, bool] | None, tokenizer: TextTokenizer
) -> RowAnswer:
    expected = expected_text(row, turn, tokenizer)
    nats = forced.nats if row.label is not None else forced.nats[forced.of(turn)]
    where = row.where if row.label is not None or len(row.answers) == 1 else f"{row.where} answer {turn.number + 1}"
    text, ended = said or ("", False)
    right = said is not None and (text == expected if row.label is not None else _is_right(text, expected))
    shared = f1(text, [expected]) if said is not None and row.label is None else None
    return RowAnswer(
        where, expected, text, right, ended, float(nats.mean()), targets=len(nats), asked=said is not None, f1=shared
    )


def _is_right(said: str, expected: str) -> bool:
    """Equal calls, or the same words: without labels, more than letters makes an answer right."""
    calls = read_calls(expected)
    return same_calls(read_calls(said), calls) if calls else exact_match(said, [expected])


def _summary(
    metric: str, rows: Sequence[Encoded], forced: Sequence[_Forced], written: Sequence[RowAnswer], labels: Sequence[str]
) -> Quality:
    targets = sum(r.targets for r in rows)
    loss = float(sum(f.nats.sum() for f in forced)) / targets
    calls = count_calls([(a.expected, a.answer) for a in written]) if not labels else None
    scores = None
    if metric in ("bleu", "chrf") and written and not labels:
        scores = TranslationScores.of([a.answer for a in written], [a.expected for a in written])
    found: dict[str, float | None] = {
        "perplexity": float(np.exp(min(loss, 80.0))),
        "accuracy": _percent([a.right for a in written]) if labels else None,
        "exact_match": None if labels or not written else _percent([a.right for a in written]),
        "f1": None if labels or not written else 100 * float(np.mean([a.f1 for a in written])),
        "bleu": scores.bleu.value if scores else None,
        "chrf": scores.chrf.value if scores else None,
        "tool_call": calls.right_percent if calls else None,
    }
    headline = ("accuracy" if labels else "perplexity") if metric == "auto" else metric
    preferred = [f.preferred == r.label for f, r in zip(forced, rows, strict=True)]
    return Quality(
        headline,
        _headline(headline, found),
        loss,
        len(rows),
        targets,
        perplexity=found["perplexity"],
        token_accuracy_percent=100 * float(sum(f.hits.sum() for f in forced)) / targets,
        accuracy_percent=found["accuracy"],
        exact_match_percent=found["exact_match"],
        f1_percent=found["f1"],
        label_percent=_percent([a.answer in labels for a in written]) if labels else None,
        ended_percent=_percent([a.ended for a in written]) if written else None,
        preferred_percent=_percent(preferred) if labels and forced[0].preferred is not None else None,
        written=None if labels else len(written),
        tool_calls=calls,
        bleu=found["bleu"],
        chrf=found["chrf"],
        signatures=scores.signatures if scores else (),
    )


def _headline(metric: str, found: dict[str, float | None]) -> float:
    value = found[metric]
    if value is None:
        what = {"accuracy": "row has a label", "tool_call": "answer that was written should be a call of a tool"}
        raise InputError(
            f"there is no {metric} of these rows: no held-out {what.get(metric, 'answer was written')}",
            where="evaluation.metric",
            hint="write auto" if metric == "accuracy" else "raise evaluation.answers and evaluation.longest_answer",
        )
    return value


def _percent(flags: Sequence[bool]) -> float:
    return 100 * sum(flags) / len(flags)
