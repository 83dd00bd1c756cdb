"""An adapter on the frozen, 4-bit base: QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.files import folder_aside
from qft.measure.quality import Quality
from qft.recipe import Recipe
from qft.stages import prepare
from qft.stages.job import Job

NEEDS = ("prepare",)


@dataclass(frozen=True)
class Facts:
    """How training went, and the quality of the tuned model: adapter beside the 4-bit base."""

    quality: Quality
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    best_step: int
    best_validation_loss: float
    last_loss: float
    resumed_from_step: int
    trainable_parameters: int


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result."""
    return {
        "quantization": recipe.quantization.model_dump(exclude={"grid"}),
        "lora": recipe.lora.model_dump(),
        "training": recipe.training.model_dump(),
        "class_weights": recipe.classification.class_weights,
        "evaluation": recipe.evaluation.model_dump(),
    }


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done."""
    return [job.run.adapter / "adapter_model.safetensors", job.run.metrics, job.run.tuned_said]


def run(job: Job, fingerprint: str) -> Facts:
    """Train from the last checkpoint of this very plan, or from the start; save the best adapter; measure it."""
    from qft.data.tokenizer import TextTokenizer
    from qft.training.loop import fine_tuning, train
    from qft.training.lora import attach, trainable

    recipe, task, folder = job.recipe, job.task, job.facts(prepare.Facts).base_folder
    tokenizer = TextTokenizer.load(folder)
    base, forward = job.load(folder, tokenizer, base=recipe.quantization.base), task.forward(tokenizer)
    rows, validation = job.rows("train"), job.rows("validation")
    fitted = forward.start(base, rows, validation, batch_size=recipe.evaluation.batch_size, on_progress=job.on_progress)
    if recipe.training.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = attach(
        base,
        r=recipe.lora.r,
        alpha=recipe.lora.alpha,
        dropout=recipe.lora.dropout,
        target_modules=recipe.lora.target_modules,
        seed=recipe.training.seed,
        task_type=task.peft_type,
    )
    result = train(
        model,
        rows,
        validation,
        _schedule(recipe),
        fine_tuning(forward, start_counts=fitted),
        folder=job.run.checkpoints / "tune",
        metrics=job.run.metrics,
        plan=fingerprint,
        on_progress=job.on_progress,
    )
    model.peft_config["default"].base_model_name_or_path = recipe.model  # not this machine's cache
    with folder_aside(job.run.adapter) as aside:
        model.save_pretrained(str(aside))
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    quality = job.measure("tune", task.torch_runner(model.eval(), tokenizer), tokenizer)
    return Facts(
        quality=quality, **vars(result), trainable_parameters=sum(p.numel() for p in trainable(model).values())
    )


def _schedule(recipe: Recipe) -> Any:
    from qft.training.loop import Schedule

    keys = recipe.training
    return Schedule(
        epochs=keys.epochs,
        learning_rate=keys.learning_rate,
        warmup_ratio=keys.warmup_ratio,
        batch_size=keys.batch_size,
        gradient_accumulation_steps=keys.gradient_accumulation_steps,
        weight_decay=keys.weight_decay,
        max_grad_norm=keys.max_grad_norm,
        evaluations=keys.evaluations,
        checkpoint_minutes=keys.checkpoint_minutes,
        seed=keys.seed,
    )
