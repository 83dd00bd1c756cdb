"""The tuned model onto the grid that ships: rounding fitted to real inputs, then to what the tuned model says.

Rounding merged weights to the nearest values of a 4-bit grid loses much of a small model's fine-tune. So each layer is
rounded for the inputs it gets (GPTQ), and then its codes, through an adapter inside the rounding, and its scales learn to give
the tuned model's answers. The result is what the file will hold, code for code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.files import folder_aside
from qft.measure.quality import Quality
from qft.recipe import Recipe
from qft.stages.job import Job
from qft.targets import Target

NEEDS = ("prepare", "merge")

MATRICES = "matrices.safetensors"


@dataclass(frozen=True)
class TargetFacts:
    """One target's grid. rounded: quality of the fitted rounding; quality: after learning, in torch.

    steps, seconds: of learning. clamped_percent: weights on the first or last code, which the grid may hold back.
    finer_layers: grid, in words → names of the layers on it that `linear` would have hurt most.
    """

    rounded: Quality
    quality: Quality
    steps: int
    seconds: float
    best_step: int
    clamped_percent: float
    finer_layers: dict[str, list[str]]


@dataclass(frozen=True)
class Facts:
    """Target name → what folding onto its grid came to; targets of 8 bits need none."""

    targets: dict[str, TargetFacts]


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result: the profiles' content, not only their names."""
    return {
        "fold": recipe.fold.model_dump(),
        "targets": [target.model_dump() for target in grid_targets(recipe)],
        "training": {"batch_size": recipe.training.rows, "seed": recipe.training.seed},
        "evaluation": recipe.evaluation.model_dump(),
    }


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done."""
    return [job.run.fold(target.name) / MATRICES for target in grid_targets(job.recipe)]


def grid_targets(recipe: Recipe) -> list[Target]:
    """The targets whose grid is coarse enough to be trained on."""
    return (
        [t for t in recipe.export.chosen() if t.linear is not None and t.linear.bits == 4]
        if recipe.quantization.grid != "none"
        else []
    )


def run(job: Job, fingerprint: str) -> Facts:
    """Fold onto every grid there is."""
    return Facts({target.name: _fold(job, target, fingerprint) for target in grid_targets(job.recipe)})


def _fold(job: Job, target: Target, fingerprint: str) -> TargetFacts:
    from qft.data.tokenizer import TextTokenizer
    from qft.quant.grids import grids_of
    from qft.quant.linear import grid_layers
    from qft.quant.store import save_matrices
    from qft.training.fold import FoldPlan, fit, learn

    recipe, keys = job.recipe, job.recipe.fold
    tokenizer = TextTokenizer.load(job.run.merged)
    model, forward = job.load(job.run.merged, tokenizer), job.task.forward(tokenizer)
    plan = FoldPlan(
        grids=grids_of(target),
        tokens=keys.tokens,
        steps=keys.steps,
        batch_size=recipe.training.rows,
        learning_rate=keys.learning_rate,
        r=keys.r,
        seed=recipe.training.seed,
    )
    lesson = fit(model, job.rows("train"), job.rows("validation"), plan, forward=forward, on_progress=job.on_progress)
    runner = job.task.torch_runner(model, tokenizer)
    rounded = job.measure(f"round-{target.name}", runner, tokenizer)
    folder = job.run.checkpoints / "fold" / target.name
    mark = f"{fingerprint} {target.name}"
    result = lesson and learn(
        model, lesson, plan, forward=forward, folder=folder, mark=mark, on_progress=job.on_progress
    )
    layers = dict(grid_layers(model))
    with folder_aside(job.run.fold(target.name)) as aside:
        save_matrices(aside / MATRICES, {name: layer.matrix() for name, layer in layers.items()})
    quality = job.measure(f"fold-{target.name}", runner, tokenizer) if result and result.best_step else rounded
    finer = {str(grid): [name for name, layer in layers.items() if layer.scheme == grid] for grid in plan.grids.finer}
    clamped = sum(layer.clamped_percent() for layer in layers.values()) / len(layers)
    return TargetFacts(
        rounded,
        quality,
        result.steps if result else 0,
        result.seconds if result else 0.0,
        result.best_step if result else 0,
        clamped,
        {grid: names for grid, names in finer.items() if names},
    )
