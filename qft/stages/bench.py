"""How fast every target's bundle is on this machine, in a fresh process, beside the machine's own limit."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qft.bundle.assignment import assigned
from qft.bundle.manifest import Bundle, update
from qft.bundle.session import PROVIDERS, open_session
from qft.measure.machine import Machine, machine
from qft.measure.speed import AnySpeed, measure_in_fresh_process
from qft.measure.threads import fastest, try_threads
from qft.progress import Progress
from qft.recipe import Recipe
from qft.stages.job import Job

NEEDS = ("quantize",)


@dataclass(frozen=True)
class Facts:
    """Target name → speed; `float` is the unquantized export, for comparison.

    on_cpu: target name → operator → nodes that the provider left to the processor, where it is not the processor's own.
    threads_tried: target name → threads → speed (`try_threads`), if bench.threads is auto.
    """

    machine: Machine
    targets: dict[str, AnySpeed]
    on_cpu: dict[str, dict[str, int]]
    threads_tried: dict[str, dict[int, float]] = field(default_factory=dict)


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result."""
    return {"bench": recipe.bench.model_dump(), "machine": asdict(machine())}


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done: only its record."""
    return []


def run(job: Job) -> Facts:
    """Measure the float export and every target."""
    keys, speeds, on_cpu, tried = job.recipe.bench, {}, {}, {}
    work = job.task.speed_settings(job.rows("eval"), prompt_tokens=keys.prompt_tokens, new_tokens=keys.new_tokens)
    names = [*job.recipe.export.targets, "float"]
    for number, name in enumerate(names):
        job.on_progress(Progress(f"bench {name}", number, len(names), "bundles"))
        if keys.threads == "auto":
            tried[name] = try_threads(job.run.bundle(name), work, provider=keys.provider)
        speeds[name] = measure_in_fresh_process(
            job.run.bundle(name),
            work,
            trials=keys.trials,
            threads=fastest(tried[name]) if keys.threads == "auto" else keys.threads,
            provider=keys.provider,
        )
        update(job.run.bundle(name), speed=asdict(speeds[name]))
        if name != "float" and keys.provider != "cpu":
            on_cpu[name] = left_to_the_processor(Bundle.load(job.run.bundle(name)), keys.provider)
    return Facts(machine(), speeds, on_cpu, tried)


def left_to_the_processor(bundle: Bundle, provider: str) -> dict[str, int]:
    """Operator → nodes, of all graphs together. Raises StageError if that is more than 5 % of the nodes of one of them."""
    found: Counter[str] = Counter()
    options = bundle.provider_options(provider)
    for model in bundle.models.values():
        session, _ = open_session(model, threads=0, provider=provider, provider_options=options)
        assignment = assigned(session, PROVIDERS[provider])
        assignment.check()
        found.update(assignment.on_cpu)
    return dict(found.most_common())
