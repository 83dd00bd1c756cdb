"""Where a model is better or worse than over all: its metric on parts of the held-out rows. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qft.errors import InputError
from qft.measure.quality import RowAnswer, higher_is_better
from qft.measure.scores import Score

_MOST_SLICES = 12  # of one way of cutting
_LEAST_ROWS = 5


@dataclass(frozen=True)
class Slice:
    """Some held-out rows: cut `by` what, having which value; their metric with its 95 % interval, loss in nats a target.

    apart: -1 or 1 where the interval leaves out the metric of all rows, on its bad or good side.
    """

    by: str
    value: str
    rows: int
    metric: float
    low: float
    high: float
    loss: float
    apart: int


def slices(
    metric: str, score: Score, answers: Sequence[RowAnswer], cuts: Mapping[str, Sequence[str | None]]
) -> list[Slice]:
    """cuts: way of cutting → every row's value, None if it has none. Of each way the worst twelve values, worst first.

    A way that tells no rows apart is left out, and a value of fewer than five rows.
    """
    whole, sign = score.of(), 1 if higher_is_better(metric) else -1
    found = []
    for by, values in cuts.items():
        places: dict[str, list[int]] = {}
        for number, value in enumerate(values):
            if value is not None:
                places.setdefault(value, []).append(number)
        large = {value: rows for value, rows in places.items() if len(rows) >= _LEAST_ROWS}
        if len(places) < 2:
            continue
        worst = sorted(large, key=lambda value: sign * score.of(large[value]))[:_MOST_SLICES]
        found += [_slice(by, value, large[value], score, answers, whole, sign) for value in worst]
    return [one for one in found if np.isfinite(one.metric)]


def _slice(
    by: str, value: str, rows: list[int], score: Score, answers: Sequence[RowAnswer], whole: float, sign: int
) -> Slice:
    low, high = score.interval(rows)
    nats = sum(answers[n].loss * answers[n].targets for n in rows) / sum(answers[n].targets for n in rows)
    apart = sign * ((low > whole) - (high < whole))
    return Slice(by, value, len(rows), score.of(rows), low, high, nats, apart)


def by_length(lengths: Sequence[int], unit: str) -> list[str]:
    """Each row's quarter, as `61 to 95 characters`; equal lengths are never parted."""
    edges = sorted({int(edge) for edge in np.quantile(lengths, [0.25, 0.5, 0.75, 1.0], method="higher")})
    names = [
        f"up to {edge} {unit}" if number == 0 else f"{edges[number - 1] + 1} to {edge} {unit}"
        for number, edge in enumerate(edges)
    ]
    return [names[int(np.searchsorted(edges, length))] for length in lengths]


def check_columns(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError if one of report.slices is in none of the rows, given by column."""
    if missing := [name for name in columns if all(row.get(name) is None for row in rows)]:
        known = ", ".join(dict.fromkeys(name for row in rows for name in row))
        raise InputError(f"no row has a column {missing[0]!r}", where="report.slices", hint=f"the rows have {known}")
