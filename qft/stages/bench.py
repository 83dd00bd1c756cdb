"""How fast every target's bundle is on this machine, in a fresh process, beside the machine's own limit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qft.bundle.manifest import update
from qft.measure.machine import Machine, machine
from qft.measure.speed import AnySpeed, measure_in_fresh_process
from qft.progress import Progress
from qft.recipe import Recipe
from qft.stages.job import Job

NEEDS = ("quantize",)


@dataclass(frozen=True)
class Facts:
    """Target name → speed; `float` is the unquantized export, for comparison."""

    machine: Machine
    targets: dict[str, AnySpeed]


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result."""
    return {"bench": recipe.bench.model_dump(), "machine": asdict(machine())}


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done: only its record."""
    return []


def run(job: Job) -> Facts:
    """Measure the float export and every target."""
    keys, speeds = job.recipe.bench, {}
    work = job.task.speed_settings(job.rows("eval"), prompt_tokens=keys.prompt_tokens, new_tokens=keys.new_tokens)
    names = [*job.recipe.export.targets, "float"]
    for number, name in enumerate(names):
        job.on_progress(Progress(f"bench {name}", number, len(names), "bundles"))
        speeds[name] = measure_in_fresh_process(
            job.run.bundle(name),
            work,
            trials=keys.trials,
            threads=keys.threads,
            provider=keys.provider,
        )
        update(job.run.bundle(name), speed=asdict(speeds[name]))
    return Facts(machine(), speeds)
