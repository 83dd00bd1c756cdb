"""Is what ships what was tuned? Parity of logits, stage by stage, and the promised budget of the task's metric."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qft.bundle.manifest import Bundle, update
from qft.errors import Problem
from qft.measure.parity import Parity, compare
from qft.measure.quality import Quality, higher_is_better
from qft.recipe import Recipe
from qft.stages import export, quantize, tune
from qft.stages.job import Job

NEEDS = ("tune", "merge", "export", "quantize")


@dataclass(frozen=True)
class Facts:
    """float_parity: torch float32 against float ONNX. targets: float ONNX against each quantized one.

    worse: how far each target is from the tuned model, in the metric's bad direction, in the budget's unit.
    """

    float_parity: Parity
    targets: dict[str, Parity]
    worse: dict[str, float]


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result."""
    return {"verify": recipe.verify.model_dump(), "budget": recipe.export.budget.model_dump()}


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done: only its record."""
    return []


def run(job: Job) -> Facts:
    """Compare on held-out rows."""
    from qft.data.tokenizer import TextTokenizer

    rows = [row.fed for row in job.rows("eval")[: job.recipe.verify.rows]]
    float_runner = _runner(job, export.TARGET)
    tokenizer = TextTokenizer.load(job.run.merged)
    model = job.load(job.run.merged, tokenizer, dtype="float32").eval()
    held_against = functools.partial(compare, rows=rows, batch_size=job.task.together, on_progress=job.on_progress)
    float_parity = held_against(job.task.torch_runner(model, tokenizer), float_runner)
    del model
    tuned, shipped = job.facts(tune.Facts).quality, job.facts(quantize.Facts).targets
    parities, worse = {}, {}
    for name in job.recipe.export.targets:
        parities[name] = held_against(float_runner, _runner(job, name))
        worse[name] = how_much_worse(tuned, shipped[name].quality, job.recipe.export.budget.max_worse)
        update(
            job.run.bundle(name),
            parity={"float": asdict(float_parity), "quantized": asdict(parities[name])},
            worse_than_tuned={"budget": job.recipe.export.budget.max_worse, "measured": worse[name]},
        )
    return Facts(float_parity, parities, worse)


def judge(facts: Facts, recipe: Recipe) -> list[Problem]:
    """What is beyond the recipe's limits."""
    keys, budget = recipe.verify, recipe.export.budget.max_worse
    found = [
        _at_least(
            "torch and float ONNX choose the same token at",
            facts.float_parity.top1,
            keys.float_top1,
            "verify.float_top1",
        ),
        _at_most(
            "the largest logit difference of torch and float ONNX is",
            facts.float_parity.max_logit_difference,
            keys.float_max_logit_difference,
            "verify.float_max_logit_difference",
        ),
    ]
    for name, parity in facts.targets.items():
        found += [
            _at_least(
                f"{name} and float ONNX choose the same token at",
                parity.top1,
                keys.quantized_top1,
                "verify.quantized_top1",
            ),
            _at_most(
                f"the mean KL divergence of {name} from float ONNX is",
                parity.mean_kl,
                keys.quantized_kl,
                "verify.quantized_kl",
            ),
        ]
        limit, unit = budget_of(budget)
        if facts.worse[name] > limit:
            found.append(
                Problem(
                    f"{name} is {facts.worse[name]:.2f} {unit} worse than the tuned model; {budget} were promised",
                    "export.budget.max_worse",
                    "ship more bits (export.targets: [cpu-int8]), or raise the budget",
                )
            )
    return [problem for problem in found if problem is not None]


def budget_of(text: str) -> tuple[float, str]:
    """'3 points' → (3.0, 'points'), '5%' → (5.0, '%')."""
    unit = "%" if text.endswith("%") else "points"
    return float(text.removesuffix(unit)), unit


def how_much_worse(tuned: Quality, shipped: Quality, budget: str) -> float:
    """How far `shipped` is from `tuned` in the metric's bad direction; negative if it is better."""
    drop = tuned.value - shipped.value if higher_is_better(tuned.metric) else shipped.value - tuned.value
    return 100 * drop / tuned.value if budget_of(budget)[1] == "%" else drop


def _runner(job: Job, target: str) -> Any:
    return Bundle.load(job.run.bundle(target)).runner()


def _at_least(what: str, value: float, limit: float, key: str) -> Problem | None:
    return (
        None if value >= limit else Problem(f"{what} {value:.2%} of positions, at least {limit:.2%} was asked for", key)
    )


def _at_most(what: str, value: float, limit: float, key: str) -> Problem | None:
    return None if value <= limit else Problem(f"{what} {value:.4g}, at most {limit:.4g} was asked for", key)
