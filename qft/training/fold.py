"""A tuned model folded onto a grid: fit the rounding to its inputs, then let codes and scales learn from what it said."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qft.data.encode import Encoded
from qft.errors import StageError
from qft.progress import OnProgress, silent
from qft.quant.fit import Fitted, fit_nearest, fit_rounding, inputs_watched
from qft.quant.grids import Grids, Scheme, dequantize, quantize_nearest
from qft.quant.linear import grid_layers, put_on_grid
from qft.training.distill import Teacher, ask_teacher, distillation_loss
from qft.training.loop import Schedule, TrainResult, train
from qft.training.sensitivity import choose_fine, divergences


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
    """Rows, and what the tuned model says about them."""

    rows: list[Encoded]
    teacher: Teacher


def fit(
    model: Any, rows: Sequence[Encoded], plan: FoldPlan, *, pad_id: int, on_progress: OnProgress = silent
) -> Lesson:
    """Ask the model about its training rows and watch its layers' inputs in the same pass; then put it on the grid, in place."""
    chosen = _draw(rows, plan.tokens, plan.seed)
    with inputs_watched(model) as hessians:
        teacher = ask_teacher(model, chosen, pad_id, on_progress=on_progress)
    fitted = fit_rounding(model, hessians, plan.grids.linear, on_progress=on_progress)
    if plan.grids.fine is not None:
        hurt = divergences(model, chosen, fitted, pad_id=pad_id, seed=plan.seed, on_progress=on_progress)
        _refine(model, fitted, hurt, plan.grids.fine, plan.grids.most_bits)
    put_on_grid(model, fitted, r=plan.r, seed=plan.seed)
    _round_head(model, plan.grids.head)
    return Lesson(chosen, teacher)


def _refine(model: Any, fitted: dict[str, Fitted], hurt: dict[str, float], fine: Scheme, most_bits: float) -> None:
    shapes = {name: (len(found.latent), found.matrix.cols) for name, found in fitted.items()}
    coarse = next(iter(fitted.values())).matrix.scheme
    for name in choose_fine(hurt, shapes, coarse, fine, most_bits):
        fitted[name] = fit_nearest(model.get_submodule(name).weight, fine)


def learn(
    model: Any,
    lesson: Lesson,
    validation: Sequence[Encoded],
    plan: FoldPlan,
    *,
    pad_id: int,
    folder: Path,
    mark: str,
    on_progress: OnProgress = silent,
) -> TrainResult | None:
    """Train gains and adapters by KL to the lesson; the best step on the validation rows stays. None if there are no steps.

    folder: for checkpoints. mark: hash of everything that decides the result.
    """
    if not plan.steps:
        return None
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
        validation,
        schedule,
        pad_id=pad_id,
        folder=folder,
        metrics=folder / "metrics.jsonl",
        plan=mark,
        loss_of=partial(distillation_loss, teacher=lesson.teacher),
        after_step=round_again,
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
