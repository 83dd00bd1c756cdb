"""How far a model has gone from the tuned one: what that said is kept at every held-out target, and held against later stages."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qft.files import write_bytes

TOP = 64  # likeliest tokens kept a position; what the others hold together is one more class
_AT_ONCE = 32  # positions: what is formed of their logits on the way takes 50 bytes a logit


@dataclass(frozen=True)
class Agreement:
    """top1_percent: targets where both have the same first choice. kl: mean KL(tuned ‖ other), nats a target token."""

    top1_percent: float
    kl: float


class Record:
    """What a model said: a row's likeliest tokens and their logs, and the log of what the rest holds, at every target."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def look(self, row: int, logits: np.ndarray) -> None:
        """logits: float (targets, vocabulary) of held-out row number `row`. Kept: 12 · 64 bytes a target."""
        found = [_likeliest(some) for some in pieces(logits)]
        ids, log_p, rest = (np.concatenate(part) for part in zip(*found, strict=True))
        self.rows[row] = (ids, log_p, rest)

    def save(self, path: Path) -> None:
        """As .npz without pickled objects."""
        parts = [np.concatenate([row[i] for row in self.rows.values()]) for i in range(3)]
        lengths = [len(row[0]) for row in self.rows.values()]
        stream = io.BytesIO()
        np.savez(stream, *parts, list(self.rows), lengths)
        write_bytes(path, stream.getvalue())

    @classmethod
    def load(cls, path: Path) -> Record:
        """Undo `save`."""
        with np.load(path, allow_pickle=False) as file:
            ids, log_p, rest, rows, lengths = (file[f"arr_{i}"] for i in range(5))
        record, cuts = cls(), np.cumsum(lengths)[:-1]
        split = zip(*(np.split(part, cuts) for part in (ids, log_p, rest)), strict=True)
        record.rows = dict(zip(rows.tolist(), split, strict=True))
        return record


class Comparison:
    """A model held against a record, row by row."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.targets = self.same = 0
        self.nats = 0.0

    def look(self, row: int, logits: np.ndarray) -> None:
        """logits: float (targets, vocabulary) of the same row that the record saw."""
        ids, log_p, rest = self.record.rows[row]
        theirs = zip(pieces(logits), pieces(ids), strict=True)
        ours = np.concatenate([np.take_along_axis(log_softmax(some), chosen, -1) for some, chosen in theirs])
        self.targets += len(ids)
        self.same += int((logits.argmax(-1) == ids[:, 0]).sum())
        self.nats += float((np.exp(log_p) * (log_p - ours)).sum() + (np.exp(rest) * (rest - _log_rest(ours))).sum())

    def agreement(self) -> Agreement:
        """Over all rows seen."""
        return Agreement(100 * self.same / self.targets, self.nats / self.targets)


def pieces(positions: np.ndarray) -> Iterator[np.ndarray]:
    """A few positions at a time, so that what is formed of their logits is small."""
    yield from (positions[start : start + _AT_ONCE] for start in range(0, len(positions), _AT_ONCE))


def _likeliest(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int32 and float64 (positions, k), the likeliest first, and float64 (positions,): see `Record`."""
    log_p = log_softmax(logits)
    count = min(TOP, log_p.shape[-1])
    ids = np.argpartition(-log_p, count - 1, axis=-1)[:, :count]
    ids = np.take_along_axis(ids, np.take_along_axis(-log_p, ids, -1).argsort(-1), -1)
    kept = np.take_along_axis(log_p, ids, -1)
    return ids.astype(np.int32), kept, _log_rest(kept)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _log_rest(log_p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(1 - np.exp(log_p).sum(-1), 1e-12))
