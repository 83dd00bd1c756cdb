"""The adapter folded into the base.

An adapter trained on the grid belongs onto that grid. For one that was not, both ways are measured and the better one kept:
people disagree which base to fold into, because it depends (peft#2321, peft#2105): the 16-bit weights hold what the 4-bit
ones lost, but the adapter was trained on the 4-bit ones and has learnt to mend their errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qft.files import folder_aside
from qft.measure.quality import Quality
from qft.recipe import Recipe
from qft.stages import prepare
from qft.stages.job import Job

NEEDS = ("prepare", "tune")

Way = Literal["grid it was trained on", "16-bit base", "dequantized 4-bit base"]


@dataclass(frozen=True)
class Facts:
    """validation_losses: nats a target token of each way tried; the least decided. quality: of the one kept."""

    quality: Quality
    way: Way
    validation_losses: dict[str, float]


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result."""
    return {"evaluation": recipe.evaluation.model_dump(), "quantization": recipe.quantization.model_dump()}


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done."""
    return [job.run.merged / "config.json"]


def run(job: Job) -> Facts:
    """Merge both ways, keep the one with the lower loss on the validation rows, measure it on the test rows."""
    from qft.data.tokenizer import TextTokenizer
    from qft.training.loop import validate
    from qft.training.lora import merge
    from qft.training.runner import TorchRunner

    recipe, folder = job.recipe, job.facts(prepare.Facts).base_folder
    tokenizer = TextTokenizer.load(folder)
    validation = job.rows("validation")
    ways = _ways(recipe)
    losses: dict[str, float] = {}
    best: Any = None
    for way in ways:
        model = merge(
            folder,
            job.run.adapter,
            quant=recipe.quantization.base,
            double_quant=recipe.quantization.double_quant,
            onto_rounded=way != "16-bit base" and recipe.quantization.base != "none",
            longest=recipe.training.max_length,
        )
        losses[way] = validate(model, validation, tokenizer.pad_id, recipe.evaluation.batch_size).loss
        if best is None or losses[way] < min(loss for other, loss in losses.items() if other != way):
            best, chosen = model, way
    _save(best.eval(), folder, job.run.merged)
    return Facts(job.measure("merge", TorchRunner(best, tokenizer.pad_id), tokenizer), chosen, losses)


def _ways(recipe: Recipe) -> list[Way]:
    if recipe.quantization.grid != "none":
        return ["grid it was trained on"]
    return ["16-bit base"] if recipe.quantization.base == "none" else ["dequantized 4-bit base", "16-bit base"]


def _save(model: Any, base: Path, target: Path) -> None:
    """A plain folder that transformers opens, with the base's tokenizer files as they were."""
    from qft.bundle.assets import copy_tokenizer

    with folder_aside(target) as aside:
        model.save_pretrained(str(aside))
        copy_tokenizer(base, aside)
