"""How well the vectors of texts find what is like them: every held-out row is looked for among the others. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qft.bundle.embedder import NOT_OFFERED
from qft.data.similar import Similar, alike
from qft.measure.agreement import log_softmax
from qft.measure.quality import Measuring, Quality, Retrieval, RowAnswer, batches
from qft.progress import OnProgress, Progress, silent


class Embedder(Protocol):
    """A model that can be measured: float32 vectors of length 1, (texts, size)."""

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray: ...


@dataclass(frozen=True)
class Search:
    """What every row finds. logits: float32 (rows, rows), cosines over the temperature. right: bool, what it should find.

    A row with a label looks for it among the texts of the other rows; one without looks for its other text among all others'.
    """

    logits: np.ndarray
    right: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """int (rows,): the place of what is found first."""
        return self.logits.argmax(-1)

    @property
    def ranks(self) -> np.ndarray:
        """int (rows,): how far down the first right one is, from 1; of equals it comes last."""
        best = np.where(self.right, self.logits, -np.inf).max(-1, keepdims=True)
        return 1 + ((self.logits >= best) & ~self.right).sum(-1)

    @property
    def nats(self) -> np.ndarray:
        """float64 (rows,): minus the log of what all right ones together hold of the softmax over what may be found."""
        log_p = np.where(self.right, log_softmax(self.logits), -np.inf)
        return -np.logaddexp.reduce(log_p, axis=-1)


def search(vectors: np.ndarray, rows: Sequence[Similar], temperature: float) -> Search:
    """vectors: float32 (rows, size) of texts with labels; without labels (2 rows, size), texts first, then the others."""
    right = alike(rows)
    logits = vectors[: len(rows)] @ vectors[-len(rows) :].T / temperature
    if rows[0].label is not None:  # a text is not its own neighbour
        np.fill_diagonal(logits, NOT_OFFERED)
        np.fill_diagonal(right, False)
    return Search(logits, right)


def looked_for(rows: Sequence[Similar]) -> list[tuple[int, ...]]:
    """The token ids of the texts that `search` needs the vectors of."""
    return [row.fed for row in rows] + ([] if rows[0].label is not None else [row.other_ids for row in rows])


def embed_all(
    embedder: Embedder, texts: Sequence[Sequence[int]], *, batch_size: int, on_progress: OnProgress = silent
) -> np.ndarray:
    """float32 (texts, size), in their order."""
    found: dict[int, np.ndarray] = {}
    for batch in batches([len(text) for text in texts], batch_size):
        found |= zip(batch, embedder.embed([texts[i] for i in batch]), strict=True)
        on_progress(Progress("measure", len(found), len(texts), "texts"))
    return np.stack([found[number] for number in range(len(texts))])


def measure_retrieval(
    embedder: Embedder, rows: Sequence[Similar], how: Measuring, *, temperature: float
) -> tuple[Quality, list[RowAnswer]]:
    """Share of rows with something right among the first 1, 5 and 10 found, and the mean of 1 over the first right one's rank.

    The rank is that of arXiv 2104.08663's MRR, without its cut at 10. A label that one row alone has cannot be found: `encode`
    leaves such rows out.
    """
    vectors = embed_all(embedder, looked_for(rows), batch_size=how.batch_size, on_progress=how.on_progress)
    found = search(vectors, rows, temperature)
    ranks, nats = found.ranks, found.nats
    answers = []
    for number, (row, place) in enumerate(zip(rows, found.first, strict=True)):
        if how.witness is not None:
            how.witness.look(number, found.logits[number][None])
        wanted, said = (_named(rows[i], row.label is not None) for i in (number, place))
        expected = row.label if row.label is not None else wanted
        rank = int(ranks[number])
        answers.append(RowAnswer(row.where, expected, said, rank == 1, True, float(nats[number]), rank=rank))
    first, five, ten = (100 * float(np.mean(ranks <= most)) for most in (1, 5, 10))
    figures = Retrieval(first, five, ten, 100 * float(np.mean(1 / ranks)))
    headline = "recall@1" if how.metric == "auto" else how.metric
    value = figures.named(headline)
    return Quality(headline, value, float(nats.mean()), len(rows), len(rows), retrieval=figures), answers


def _named(row: Similar, labelled: bool) -> str:
    return f"{row.text} ({row.label})" if labelled else row.other
