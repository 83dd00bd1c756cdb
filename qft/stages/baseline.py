"""How good the untouched base is on the held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.data.tokenizer import TextTokenizer
from qft.measure.quality import Quality
from qft.recipe import Recipe
from qft.stages import prepare, tune
from qft.stages.job import Job

NEEDS = ("prepare",)


@dataclass(frozen=True)
class Facts:
    """Quality of the base in its 16-bit weights; a new head knows how frequent labels are, and nothing of the text."""

    quality: Quality


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result."""
    return {
        "evaluation": recipe.evaluation.model_dump(),
        "compute_dtype": recipe.quantization.compute_dtype,
        "temperature": recipe.sentence_similarity.temperature,
    }


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done."""
    return [job.run.answers("baseline")]


def run(job: Job) -> Facts:
    """Measure the base. Raises InputError, before anything is loaded, if it cannot be tuned here."""
    tune.choices(job)
    tokenizer = TextTokenizer.load(job.facts(prepare.Facts).base_folder)
    return Facts(job.measure("baseline", base_runner(job), tokenizer))


def base_runner(job: Job) -> Any:
    """The untouched base as something that can be measured."""
    folder = job.facts(prepare.Facts).base_folder
    tokenizer = TextTokenizer.load(folder)
    return job.task.torch_runner(job.load(folder, tokenizer).eval(), tokenizer)
