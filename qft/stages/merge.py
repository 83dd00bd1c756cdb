"""What was learnt merged into the base.

Both ways are measured: people disagree which base to merge into, because it depends (peft#2321, peft#2105): the 16-bit weights
hold what the 4-bit ones lost, but the adapter was trained on the 4-bit ones and has learnt to mend their errors. The dequantized
4-bit base gives the very model that was tuned, so it is kept unless the other one is better beyond chance.

What is kept has its channels evened out, which changes no answer and makes it easier to round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from qft.files import folder_aside
from qft.measure.quality import Quality
from qft.recipe import Recipe
from qft.stages import prepare, tune
from qft.stages.job import Job

if TYPE_CHECKING:
    from qft.data.tokenizer import TextTokenizer
    from qft.training.forward import Validation

NEEDS = ("prepare", "tune")

Way = Literal["16-bit base", "dequantized 4-bit base"]


@dataclass(frozen=True)
class Facts:
    """validation_losses: nats a target token of each way tried. quality: of the one kept. evened_out: inputs of its layers."""

    quality: Quality
    way: Way
    validation_losses: dict[str, float]
    evened_out: int


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result."""
    return {
        "evaluation": recipe.evaluation.model_dump(),
        "quantization": recipe.quantization.model_dump(exclude={"grid"}),
    }


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done."""
    return [job.run.merged / "config.json"]


def run(job: Job) -> Facts:
    """Merge both ways, choose by the loss on the validation rows, even out the chosen one and measure it on the test rows."""
    import torch

    from qft.base_model import is_quantized, own_type
    from qft.data.tokenizer import TextTokenizer
    from qft.device import compute_type
    from qft.quant.smooth import even_out

    recipe, task, folder = job.recipe, job.task, job.facts(prepare.Facts).base_folder
    tokenizer = TextTokenizer.load(folder)
    forward, validation = task.forward(tokenizer), job.rows("validation")
    dtype = compute_type(recipe.quantization.compute_dtype)
    there = ways(recipe.quantization.base, packed=is_quantized(folder))
    models = {way: _merged(job, tokenizer, way).to(dtype) for way in there}
    found = {way: forward.validate(model, validation, recipe.evaluation.batch_size) for way, model in models.items()}
    chosen = choose(found)
    best = models[chosen]
    evened_out = even_out(best, job.rows("train"), forward.feed)
    quality = job.measure("merge", task.torch_runner(best.eval(), tokenizer), tokenizer)
    # Its values are those of the base's own type, whatever they are computed in.
    _save(best.to(getattr(torch, own_type(folder))), folder, job.run.merged)
    return Facts(quality, chosen, {way: measured.loss for way, measured in found.items()}, evened_out)


def _merged(job: Job, tokenizer: TextTokenizer, way: Way) -> Any:
    from qft.base_model import is_quantized, own_type
    from qft.training.lora import round_base

    keys, folder = job.recipe.quantization, job.facts(prepare.Facts).base_folder
    model = job.load(folder, tokenizer, dtype=own_type(folder))
    if way != "16-bit base" and not is_quantized(folder):
        skipped = keys.skip_modules or ()
        round_base(model, base=keys.base, double_quant=keys.double_quant, skip_modules=skipped)
    return tune.method_of(job.recipe).merge(model, job.run.adapter)


def choose(found: Mapping[Way, Validation]) -> Way:
    """The 16-bit base, if it is the only way, or if its rows' losses are lower by more than two standard errors, paired."""
    if len(found) == 1:
        return next(iter(found))
    pairs = zip(found["16-bit base"].row_nats, found["dequantized 4-bit base"].row_nats, strict=True)
    gains = [rounded - sixteen for sixteen, rounded in pairs]
    better = len(gains) > 1 and fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5
    return "16-bit base" if better else "dequantized 4-bit base"


def ways(base: str, *, packed: bool = False) -> list[Way]:
    """Those there are for a base precision, `quantization.base`. packed: the checkpoint has no 16-bit weights to merge into."""
    if base == "none":
        return ["16-bit base"]
    return ["dequantized 4-bit base"] if packed else ["dequantized 4-bit base", "16-bit base"]


def _save(model: Any, base: Path, target: Path) -> None:
    """A plain folder that transformers opens, with the base's tokenizer files as they were."""
    from qft.bundle.assets import copy_tokenizer

    with folder_aside(target) as aside:
        model.save_pretrained(str(aside))
        copy_tokenizer(base, aside)
