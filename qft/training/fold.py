"""A tuned model folded onto a grid: fit the rounding to its inputs, then let codes and scales learn from what it said."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qft.data.encode import Encoded
from qft.errors import StageError
from qft.progress import OnProgress, silent
from qft.quant.fit import decoder_linears, expected_error, fit_rounding, inputs_watched
from qft.quant.grids import Grids, Scheme, dequantize, quantize_nearest
from qft.quant.linear import grid_layers, put_on_grid
from qft.training.distill import Teacher, ask_teacher, distillation_loss, divergence_from_teacher, feed
from qft.training.loop import Objective, Schedule, TrainResult, train
from qft.training.sensitivity import choose_grids, divergences


@dataclass(frozen=True)
class FoldPlan:
    """grids: what the target stores weights on.

    tokens: of the training rows that rounding is fitted on and the teacher is asked about. steps: of learning, batch_size
    rows each; 0: fitted rounding alone. r: rank of the adapter inside the rounding.
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

    rows: list[Encoded]
    teacher: Teacher
    held_out: list[Encoded]
    held_out_teacher: Teacher


def fit(
    model: Any,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    plan: FoldPlan,
    *,
    pad_id: int,
    on_progress: OnProgress = silent,
) -> Lesson | None:
    """Watch the inputs that the model's layers get on training rows; then put it on the grid, in place.

    Returns what `learn` needs of the model as it was before; None if the plan has no steps of learning.
    """
    chosen = _draw(rows, plan.tokens, plan.seed)
    look = ask_teacher if plan.steps else feed
    with inputs_watched(model) as hessians:
        teacher = look(model, chosen, pad_id, on_progress=on_progress)
    lesson = None
    if teacher is not None:
        held_out = ask_teacher(model, validation, pad_id, on_progress=on_progress)
        lesson = Lesson(chosen, teacher, list(validation), held_out)
    fitted = fit_rounding(
        model, hessians, dict.fromkeys(decoder_linears(model), plan.grids.linear), on_progress=on_progress
    )
    if plan.grids.finer:
        hurt = divergences(model, chosen, fitted, pad_id=pad_id, seed=plan.seed, on_progress=on_progress)
        better = _finer(model, hessians, hurt, plan.grids)
        fitted |= fit_rounding(model, hessians, better, on_progress=on_progress)
    put_on_grid(model, fitted, r=plan.r, seed=plan.seed)
    _round_head(model, plan.grids.head)
    return lesson


def _finer(model: Any, hessians: dict[str, Tensor], hurt: dict[str, float], grids: Grids) -> dict[str, Scheme]:
    """The layers that get a finer grid. hurt: by the coarse one; by the others in proportion to the error expected of them."""
    weights = {name: linear.weight for name, linear in decoder_linears(model).items()}
    by_grid: dict[str, dict[Scheme, float]] = {}
    for name, weight in weights.items():
        errors = {grid: expected_error(weight, hessians[name], grid) for grid in (grids.linear, *grids.finer)}
        share = hurt[name] / max(errors[grids.linear], 1e-30)  # a layer that was fed nothing but zeros errs nowhere
        by_grid[name] = {grid: share * error for grid, error in errors.items()}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    chosen = choose_grids(by_grid, shapes, grids.most_bits)
    return {name: grid for name, grid in chosen.items() if grid != grids.linear}


def learn(
    model: Any,
    lesson: Lesson,
    plan: FoldPlan,
    *,
    pad_id: int,
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

    return train(
        model,
        lesson.rows,
        lesson.held_out,
        schedule,
        pad_id=pad_id,
        folder=folder,
        metrics=folder / "metrics.jsonl",
        plan=mark,
        objective=Objective(
            loss_of=partial(distillation_loss, teacher=lesson.teacher),
            judge=partial(divergence_from_teacher, teacher=lesson.held_out_teacher),
            start_counts=True,
            after_step=round_again,
        ),
        on_progress=on_progress,
    )


def _draw(rows: Sequence[Encoded], tokens: int, seed: int) -> list[Encoded]:
    """Rows drawn at random until they hold `tokens` tokens."""
    chosen: list[Encoded] = []
    count = 0
    for row in random.Random(seed).sample(rows, len(rows)):
        if count >= tokens:
            break
        chosen.append(row)
        count += len(row.input_ids)
    return chosen


def _round_head(model: Any, scheme: Scheme) -> None:
    """Embedding and head as they will be stored, one matrix where they are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in [embedding] if head is None or head.weight is embedding.weight else [embedding, head]:
        weight = module.weight
        if not weight.is_floating_point():
            raise StageError("embedding or head is quantized already")
        weight.data = dequantize(quantize_nearest(weight.data, scheme)).to(weight.dtype)
