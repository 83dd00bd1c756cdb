"""What the stages that tune and merge make of a recipe."""

from __future__ import annotations

from pathlib import Path

import torch

from qft import pipeline
from qft.base_model import load, read_config
from qft.bundle.assets import copy_tokenizer
from qft.progress import silent
from qft.recipe_loader import load_recipe
from qft.runfolder import RunFolder
from qft.stages import merge, tune
from qft.stages.job import Job
from qft.training.lora import trainable


def job(folder: Path, *overrides: str) -> Job:
    recipe = load_recipe(folder / "recipe.yaml", overrides).recipe
    return Job(recipe, folder, RunFolder(folder / "run"), folder / "cache", silent)


def test_activations_are_computed_twice_without_reentering_autograd(recipe_folder: Path) -> None:
    """The other way asks that inputs learn, which a frozen embedding's do not: adapters would get no gradient."""
    made = job(recipe_folder, "training.gradient_checkpointing=true")
    pipeline.run(made, ["prepare"])
    work = tune._work(made)
    assert work.how.gradient_checkpointing
    layers = [m for m in work.model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert len(layers) >= 2
    assert all(layer._gradient_checkpointing_func.keywords == {"use_reentrant": False} for layer in layers)


def test_codes_lie_in_the_type_that_is_asked_for_and_the_adapter_learns_beside_them(recipe_folder: Path) -> None:
    made = job(recipe_folder, "quantization.storage_dtype=bfloat16")
    pipeline.run(made, ["prepare"])
    work = tune._work(made)
    held = {m.weight.dtype for m in work.model.modules() if type(m).__name__ == "Linear4bit"}
    assert held == {torch.bfloat16}
    work.learning["objective"].loss_of(work.model.train(), work.learning["rows"][:4]).backward()
    gradients = [p.grad for name, p in trainable(work.model).items() if "lora_B" in name]
    assert all(gradient is not None and 0 < gradient.abs().max() < torch.inf for gradient in gradients)


def test_a_checkpoint_that_is_in_few_bits_already_goes_through_both_and_is_merged_once(
    recipe_folder: Path, tiny_model: Path
) -> None:
    packed = recipe_folder / "packed"
    load(tiny_model, base="fp4", double_quant=True, compute_dtype="bfloat16").save_pretrained(packed)
    copy_tokenizer(tiny_model, packed)
    made = job(recipe_folder, f"model={packed}", "quantization.base=fp4", "training.epochs=1", "training.evaluations=1")
    pipeline.run(made, ["merge"])
    facts = made.facts(merge.Facts)
    assert facts.way == "dequantized 4-bit base"
    assert list(facts.validation_losses) == [facts.way]
    assert "quantization_config" not in read_config(made.run.merged)
