"""A few steps of a run, done to tell what all of them will take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.data.encode import EncodedRow, tokens_of
from qft.measure.machine import peak_memory
from qft.progress import OnProgress, Progress, silent
from qft.training.checkpoint import Position
from qft.training.loop import Objective, Run, Schedule

_LOOKED_AT_ROWS = 32


@dataclass(frozen=True)
class Trial:
    """What a run's learning will take. steps, tokens: all of it. seconds: predicted, with the looks at held-out rows.

    peak_memory_bytes: of this process, in the steps that were done, one of them on the longest rows.
    """

    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int


def try_steps(
    model: Any,
    rows: Sequence[EncodedRow],
    validation: Sequence[EncodedRow],
    schedule: Schedule,
    objective: Objective,
    *,
    optimizer: str = "adamw",
    loss_scaling: bool = False,
    on_progress: OnProgress = silent,
) -> Trial:
    """Learn from the longest rows, which is not timed, and from those of three other steps; look at some held-out rows.

    The arguments are those of `train`. The model is not the same afterwards; a new head is not fitted before.
    """
    run = Run(model, rows, validation, schedule, objective, Path(), "", optimizer, loss_scaling)
    tokens = [tokens_of([rows[i] for i in step]) for step in run.steps]
    longest = [max(len(rows[i].input_ids) for i in step) for step in run.steps]
    by_tokens = sorted(range(len(tokens)), key=tokens.__getitem__)
    chosen = [longest.index(max(longest)), *(by_tokens[len(tokens) * part // 4] for part in (1, 2, 3))]
    objective.after_step()
    model.train()
    lines = []
    with peak_memory() as peak:
        for done, step in enumerate(chosen):
            on_progress(Progress("try steps", done, len(chosen), "steps"))
            lines.append(run.step(Position(step, 0, 0.0, 0.0, 0))[1])
        looking = _look_seconds(run)
    rate = sum(line["tokens"] for line in lines[1:]) / sum(line["seconds"] for line in lines[1:])
    return Trial(len(tokens), sum(tokens), rate, sum(tokens) / rate + looking, peak.bytes)


def _look_seconds(run: Run) -> float:
    """Of all looks at held-out rows."""
    some, began = run.validation[:_LOOKED_AT_ROWS], time.monotonic()
    run.objective.judge(run.model, some, run.schedule.batch_size)
    return len(run.evaluate_at) * (time.monotonic() - began) * tokens_of(run.validation) / tokens_of(some)
