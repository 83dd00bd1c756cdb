"""Do two runtimes compute the same function? Logits compared position by position. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qft.measure.agreement import log_softmax
from qft.measure.quality import Runner, batches
from qft.progress import OnProgress, Progress, silent


@dataclass(frozen=True)
class Parity:
    """top1: share of positions with the same first choice. kl: mean divergence of the second from the first, nats a token."""

    positions: int
    top1: float
    max_logit_difference: float
    mean_kl: float


def compare(
    reference: Runner,
    other: Runner,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int = 4,
    on_progress: OnProgress = silent,
) -> Parity:
    """Every position of every row, both models fed the same left-padded batches."""
    positions = same = done = 0
    largest = divergence = 0.0
    for batch in batches([len(r) for r in rows], batch_size):
        chosen = [rows[i] for i in batch]
        keep = max(map(len, chosen))
        for row, a, b in zip(chosen, reference.logits(chosen, keep), other.logits(chosen, keep), strict=True):
            p, q = a[-len(row) :], b[-len(row) :]  # a classifier has one position
            positions += len(p)
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            largest = max(largest, float(np.abs(p - q).max()))
            log_p, log_q = log_softmax(p), log_softmax(q)
            divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        done += len(batch)
        on_progress(Progress("compare", done, len(rows), "rows"))
    return Parity(positions, same / positions, largest, divergence / positions)
