"""Runs beside each other: what their recipes say otherwise, what it came to, and which differences are more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qft.bundle.classifier import Labels
from qft.measure.energy import watt_hours
from qft.measure.quality import Quality, RowAnswer
from qft.measure.scores import Difference, Score, difference, score_of
from qft.measure.speed import mb
from qft.report.summary import Summary, metric_name, value_text


@dataclass(frozen=True)
class Compared:
    """A run that is compared. keys: its recipe, dotted. answers: stage (`shipped (cpu-int4)`) → its answers to held-out rows.

    origins: name of a file of rows → its sha256, by which rows of two runs are known to be the same.
    """

    summary: Summary
    keys: Mapping[str, Any]
    labels: Labels
    answers: Mapping[str, list[RowAnswer]]
    origins: Mapping[str, str]


@dataclass(frozen=True)
class StageValue:
    """A run's metric after a stage; difference: to the first run's, where both answered the same rows."""

    metric: str
    value: float
    rows: int
    difference: Difference | None


@dataclass(frozen=True)
class Comparison:
    """The first run is what the others are held against. Lists have a place for every run, None where it has no figure.

    same_rows: whether every run was measured on the first one's held-out rows; without that no difference is given.
    """

    runs: list[str]
    same_rows: bool
    recipes: dict[str, list[Any]]
    stages: dict[str, list[StageValue | None]]
    figures: dict[str, list[str | None]]


def compare(runs: Sequence[Compared]) -> Comparison:
    """Hold runs against the first of them."""
    first, *others = runs
    same = [_same_rows(first, other) for other in others]
    names = list(dict.fromkeys(step.name for run in runs for step in run.summary.waterfall))
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    recipes = {key: [run.keys.get(key) for run in runs] for key in keys}
    return Comparison(
        [run.summary.name for run in runs],
        all(same),
        {key: values for key, values in recipes.items() if any(value != values[0] for value in values)},
        {
            name: [_value(first, run, name, same=flag) for run, flag in zip(runs, [False, *same], strict=True)]
            for name in names
        },
        _figures([run.summary for run in runs]),
    )


def tables(found: Comparison) -> list[tuple[str, list[list[str]]]]:
    """What the screen and the page show: titled tables, a column for every run after the first of names."""
    return [
        ("What the recipes say otherwise", [[key, *map(_shown, values)] for key, values in found.recipes.items()]),
        ("Quality", [[name, *map(_quality_cell, values)] for name, values in found.stages.items()]),
        ("Size, speed, time, memory", [[name, *map(_shown, values)] for name, values in found.figures.items()]),
    ]


def about(found: Comparison) -> str:
    """How differences of quality are to be read."""
    if found.same_rows:
        return (
            f"In brackets the difference to {found.runs[0]} and its 95 % interval, over 2,000 draws of the held-out rows that both "
            "answered (paired bootstrap, Koehn 2004); a star where 0 lies outside it."
        )
    return "The runs were not measured on the same held-out rows: differences between their figures may come from the rows alone."


def _quality(run: Compared, name: str) -> Quality | None:
    return next((step.quality for step in run.summary.waterfall if step.name == name), None)


def _value(first: Compared, run: Compared, name: str, *, same: bool) -> StageValue | None:
    ours, theirs = _quality(run, name), _quality(first, name)
    if ours is None:
        return None
    apart = None
    if same and theirs is not None and theirs.metric == ours.metric:
        before, after = (_score(one, name, ours.metric) for one in (first, run))
        apart = difference(before, after) if before and after else None
    return StageValue(ours.metric, ours.value, ours.rows, apart)


def _score(run: Compared, name: str, metric: str) -> Score | None:
    """By rows in an order that all runs share."""
    return score_of(metric, sorted(run.answers[name], key=_place), run.labels) if run.answers.get(name) else None


def _place(answer: RowAnswer) -> tuple[str, str]:
    return answer.where, answer.expected


def _same_rows(first: Compared, other: Compared) -> bool:
    return _rows(first) == _rows(other) != []


def _rows(run: Compared) -> list[tuple[str, str, str]]:
    answers = next(iter(run.answers.values()), [])
    return sorted((*_place(answer), run.origins.get(answer.where.rpartition(":")[0], "")) for answer in answers)


def _figures(runs: Sequence[Summary]) -> dict[str, list[str | None]]:
    found: dict[str, list[str | None]] = {
        "bundle": [
            mb(run.sizes[run.headline_target].bundle_bytes) if run.headline_target in run.sizes else None
            for run in runs
        ],
        "speed": [
            run.speeds[run.headline_target].headline if run.headline_target in run.speeds else None for run in runs
        ],
        "bundle's memory": [
            mb(run.speeds[run.headline_target].peak_memory_bytes) if run.headline_target in run.speeds else None
            for run in runs
        ],
        "values learnt": [f"{run.training.trainable_parameters:,}" if run.training else None for run in runs],
        "training": [
            f"{run.training.seconds:,.0f} s, {run.training.tokens_per_second:,.0f} tokens/s" if run.training else None
            for run in runs
        ],
        "all stages": [f"{run.seconds:,.0f} s" for run in runs],
        "peak memory": [mb(max(run.stage_memory_bytes.values(), default=0)) for run in runs],
        "energy": [watt_hours(run.energy) for run in runs],
        "machine": [run.machine.processor if run.machine else None for run in runs],
    }
    return {name: values for name, values in found.items() if any(values)}


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def _quality_cell(value: StageValue | None) -> str:
    if value is None:
        return "–"
    text = f"{metric_name(value.metric)} {value_text(value.metric, value.value)}"
    if (apart := value.difference) is None:
        return text
    return f"{text} ({apart.value:+.2f}, {apart.low:+.2f} to {apart.high:+.2f}){' *' if apart.certain else ''}"
