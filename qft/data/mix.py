"""Sources mixed by weight: how often each one's training rows are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qft.data.examples import Example
from qft.data.split import take_by_hash
from qft.errors import InputError


@dataclass(frozen=True)
class Mixed:
    """One source of data.train: its training rows, changed copies among them, and how many there are after mixing."""

    source: str
    weight: float
    rows: int
    mixed_rows: int


def mix(
    examples: Sequence[Example], sources: Sequence[str], weights: Sequence[float], *, seed: int
) -> tuple[list[Example], list[Mixed]]:
    """Training rows, each of source n `weights[n]` times: all of them as often as the weight is whole, and for its fraction that
    share of them, chosen by hash. 3 is three times, 0.5 half of the rows, 0 none.

    Raises InputError unless there is a weight for each source, and rows are left.
    """
    if len(weights) != len(sources):
        raise InputError(
            f"{len(weights)} weights for {len(sources)} sources",
            where="data.weights",
            hint="give one number for each source of data.train, in their order",
        )
    mixed, counts = [], []
    for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        rows = [e for e in examples if e.source == number]
        whole, fraction = divmod(weight, 1)
        # Another draw than that of data.max_train_rows: of the rows that it left, these are chosen anew.
        found = rows * int(whole) + take_by_hash(rows, round(fraction * len(rows)), seed=seed + 1)
        counts.append(Mixed(source, weight, len(rows), len(found)))
        mixed += found
    if not mixed:
        raise InputError("no row is left to learn from", where="data.weights", hint="give one source more weight")
    return mixed, counts
