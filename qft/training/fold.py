"""A tuned model folded onto a grid: fit the rounding to its inputs, then let codes and scales learn from what it said."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft.data.encode import EncodedRow
from qft.errors import StageError
from qft.measure.quality import batches
from qft.progress import OnProgress, silent
from qft.quant.fit import decoder_linears, fit_rounding
from qft.quant.grids import Grids, Scheme, dequantize, quantize_nearest
from qft.quant.linear import grid_layers, put_on_grid
from qft.training.forward import Forward
from qft.training.loop import Objective, Schedule, TrainResult, train
from qft.training.sensitivity import Felt, choose_grids, expected_divergence, feel


@dataclass(frozen=True)
class FoldPlan:
    """grids: what the target stores weights on.

    tokens: of the training rows that rounding is fitted on, and of those to learn from. steps: of learning, batch_size rows each;
    0: fitted rounding alone. r: rank of the adapter inside the rounding.
    """

    grids: Grids
    tokens: int
    steps: int
    batch_size: int
    learning_rate: float
    r: int
    seed: int


@dataclass(frozen=True)
class Lesson:
    """Rows to learn from and held-out rows to judge by, and what the tuned model says about either."""

    rows: list[EncodedRow]
    teacher: Any
    held_out: list[EncodedRow]
    held_out_teacher: Any


def fit(
    model: Any,
    rows: Sequence[EncodedRow],
    validation: Sequence[EncodedRow],
    plan: FoldPlan,
    *,
    forward: Forward,
    on_progress: OnProgress = silent,
) -> Lesson | None:
    """Feel on training rows what rounding the model's layers would hurt; then put it on the grid, in place.

    Returns what `learn` needs of the model as it was before; None if the plan has no steps of learning.
    """
    fed, learnt = _draw(rows, plan)
    block = min(grid.block for grid in (plan.grids.linear, *plan.grids.finer))
    felt = feel(model, fed, block, forward=forward, seed=plan.seed, on_progress=on_progress)
    lesson = None
    if learnt:
        held_out = list(validation)
        said = [forward.ask(model, some, on_progress=on_progress) for some in (learnt, held_out)]
        lesson = Lesson(learnt, said[0], held_out, said[1])
    schemes = _choose(model, felt, block, plan.grids)
    fitted = fit_rounding(model, {name: each.hessian for name, each in felt.items()}, schemes, on_progress=on_progress)
    put_on_grid(model, fitted, r=plan.r, seed=plan.seed)
    if plan.grids.head is not None:
        _round_head(model, plan.grids.head)
    return lesson


def _choose(model: Any, felt: dict[str, Felt], block: int, grids: Grids) -> dict[str, Scheme]:
    """Every layer's grid."""
    weights = {name: linear.weight for name, linear in decoder_linears(model).items()}
    by_grid = {
        name: {grid: expected_divergence(weight, felt[name], block, grid) for grid in (grids.linear, *grids.finer)}
        for name, weight in weights.items()
    }
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    return choose_grids(by_grid, shapes, grids.most_bits)


def learn(
    model: Any,
    lesson: Lesson,
    plan: FoldPlan,
    *,
    forward: Forward,
    folder: Path,
    mark: str,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Train gains and adapters by KL to the lesson; the step nearest to the tuned model on held-out rows stays, 0 being one.

    folder: for checkpoints. mark: hash of everything that decides the result.
    """
    schedule = Schedule(
        epochs=plan.steps * plan.batch_size / len(lesson.rows),
        learning_rate=plan.learning_rate,
        warmup_ratio=0.1,
        batch_size=plan.batch_size,
        gradient_accumulation_steps=1,
        weight_decay=0.0,
        max_grad_norm=math.inf,
        evaluations=2,
        checkpoint_minutes=2,
        seed=plan.seed,
    )

    def round_again() -> None:
        for _, layer in grid_layers(model):
            layer.round_again()

    def loss_of(model: Any, rows: Sequence[EncodedRow]) -> Tensor:
        return forward.divergence(model, rows, lesson.teacher)

    @torch.no_grad()
    def judge(model: Any, rows: Sequence[EncodedRow], batch_size: int) -> dict[str, float]:
        model.eval()
        nats = 0.0
        for batch in batches([len(row.input_ids) for row in rows], batch_size):
            nats += float(forward.divergence(model, [rows[i] for i in batch], lesson.held_out_teacher))
        model.train()
        return {"validation_loss": nats / sum(row.targets for row in rows)}

    return train(
        model,
        lesson.rows,
        lesson.held_out,
        schedule,
        Objective(loss_of, judge, start=lambda: True, after_step=round_again),
        folder=folder,
        metrics=folder / "metrics.jsonl",
        plan=mark,
        on_progress=on_progress,
    )


def _draw(rows: Sequence[EncodedRow], plan: FoldPlan) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Rows to fit rounding on and rows to learn from: others, as far as there are any."""
    mixed = random.Random(plan.seed).sample(rows, len(rows))
    fed = _first(mixed, plan.tokens)
    return fed, _first([*mixed[len(fed) :], *fed], plan.tokens)[: plan.steps * plan.batch_size]


def _first(rows: list[EncodedRow], tokens: int) -> list[EncodedRow]:
    """As many as hold so many tokens."""
    ends = list(accumulate(len(row.input_ids) for row in rows))
    return rows[: bisect_left(ends, tokens) + 1]


def _round_head(model: Any, scheme: Scheme) -> None:
    """Embedding and head as they will be stored, one matrix where they are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in [embedding] if head is None or head.weight is embedding.weight else [embedding, head]:
        weight = module.weight
        if not weight.is_floating_point():
            raise StageError("embedding or head is quantized already")
        weight.data = dequantize(quantize_nearest(weight.data, scheme)).to(weight.dtype)
