"""The base is tuned: by an adapter on its frozen 4-bit form (QLoRA, arXiv 2305.14314), its head alone, or every weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.data.inspect import DataReport
from qft.device import Choices, accelerator, choose
from qft.device_memory import ModelSize, Tuning
from qft.files import folder_aside
from qft.measure.machine import available_memory
from qft.measure.quality import Quality
from qft.processor_memory import FUSED, bfloat16_is_fast
from qft.recipe import Recipe
from qft.stages import prepare
from qft.stages.job import Job, dotted, sound_changes
from qft.tasks.registry import find_task
from qft.tasks.speech_recognition import POSITIONS_A_SECOND

if TYPE_CHECKING:
    from qft.data.tokenizer import TextTokenizer
    from qft.training.methods import Method
    from qft.training.trial import Trial

NEEDS = ("prepare",)


@dataclass(frozen=True)
class Facts:
    """How training went, and the quality of the tuned model, before any merge."""

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
    choices: Choices


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result."""
    return {
        "quantization": recipe.quantization.model_dump(exclude={"grid"}),
        "tuning": recipe.tuning.model_dump(),
        "lora": recipe.lora.model_dump(),
        "training": recipe.training.model_dump(exclude={"max_memory"}),  # how many rows go at once is no other plan
        "class_weights": recipe.classification.class_weights,
        "temperature": recipe.sentence_similarity.temperature,
        "evaluation": recipe.evaluation.model_dump(),
    }


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done."""
    kept = next(job.run.adapter.glob("*.safetensors"), job.run.adapter / "adapter_model.safetensors")
    return [kept, job.run.metrics, job.run.tuned_said]


def run(job: Job, fingerprint: str) -> Facts:
    """Train from the last checkpoint of this very plan, or from the start; save the best step; measure it."""
    from qft.training.loop import train
    from qft.training.lora import trainable
    from qft.training.trackers import check_trackers, tracking

    recipe = job.recipe
    check_trackers(recipe.training.trackers)  # before anything is loaded
    work = _work(job)
    with tracking(recipe.training.trackers, job.run.name, job.run.trackers, dict(dotted(recipe))) as trackers:
        result = train(
            work.model,
            **work.learning,
            folder=job.run.checkpoints / "tune",
            metrics=job.run.metrics,
            plan=fingerprint,
            on_step=trackers.step,
        )
    with folder_aside(job.run.adapter) as aside:
        work.method.save(work.model, aside)
    quality = job.measure("tune", job.task.torch_runner(work.model.eval(), work.tokenizer), work.tokenizer)
    return Facts(
        quality=quality,
        **vars(result),
        trainable_parameters=sum(p.numel() for p in trainable(work.model).values()),
        choices=work.how,
    )


def trial(job: Job) -> Trial:
    """A few steps of it, to tell what all of them will take. Nothing is kept."""
    from qft.training.trial import try_steps

    work = _work(job)
    return try_steps(work.model, **work.learning)


@dataclass(frozen=True)
class _Work:
    """What is tuned, and how. learning: what `train` and `try_steps` ask for besides the model."""

    model: Any
    tokenizer: TextTokenizer
    method: Method
    how: Choices
    learning: dict[str, Any]


def _work(job: Job) -> _Work:
    from qft.data.tokenizer import TextTokenizer
    from qft.training.hearing import hearing
    from qft.training.loop import fine_tuning
    from qft.training.noise import add_noise

    recipe, task, folder = job.recipe, job.task, job.facts(prepare.Facts).base_folder
    tokenizer = TextTokenizer.load(folder)
    new_tokens = [tokenizer.token_id(token) for token in recipe.data.new_tokens or ()]
    method, whole, how = method_of(recipe, new_tokens), recipe.tuning.method == "full", choices(job)
    dtype = "float32" if whole else how.dtype
    base = job.load(folder, tokenizer, base=recipe.quantization.base, dtype=dtype, device=how.device)
    forward = task.forward(tokenizer)
    rows, validation = job.rows("train"), job.rows("validation")
    if how.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = method.attach(base)

    def start() -> bool:
        size = recipe.evaluation.batch_size
        return forward.start(model, rows, validation, batch_size=size, on_progress=job.on_progress)

    add_noise(base, recipe.training.neftune_noise_alpha)
    changes = sound_changes(recipe)
    learning = hearing(forward, changes) if changes else forward
    asked = {
        "rows": rows,
        "validation": validation,
        "schedule": _schedule(recipe, how),
        "objective": fine_tuning(learning, label_smoothing=recipe.training.label_smoothing, start=start),
        "optimizer": how.optimizer,
        "loss_scaling": how.loss_scaling,
        "on_progress": job.on_progress,
    }
    return _Work(model, tokenizer, method, how, asked)


def choices(job: Job) -> Choices:
    """On what and how the recipe's base is tuned here, from this machine and the checkpoint's headers."""
    recipe, facts = job.recipe, job.facts(prepare.Facts)
    keys, size = recipe.training, ModelSize.of(facts.base_folder)
    return choose(
        accelerator() if keys.device != "cpu" else None,
        size,
        _wanted(recipe, size, facts.report),
        device=keys.device,
        dtype=recipe.quantization.compute_dtype,
        accumulation=keys.gradient_accumulation_steps,
        memory=available_memory(),
        max_memory=keys.max_memory,
    )


def _wanted(recipe: Recipe, size: ModelSize, rows: DataReport) -> Tuning:
    """What the recipe asks for."""
    keys, method, dtype = recipe.training, recipe.tuning.method, recipe.quantization.compute_dtype
    speech, pairs = (recipe.task == name for name in ("automatic-speech-recognition", "sentence-similarity"))
    half = dtype in ("bfloat16", "float16") or (dtype == "auto" and bfloat16_is_fast())
    plain = method == "lora" and not (recipe.lora.dropout or recipe.lora.use_dora)
    longest, writes = rows.length_longest, find_task(recipe.task).export_task.endswith("with-past")
    share = rows.train_target_tokens / max(1, rows.train_tokens)
    return Tuning(
        recipe.quantization.base,
        recipe.quantization.double_quant,
        r={"lora": recipe.lora.r, "head": 1, "full": 0}[method],  # a head learns less than rank 1 does
        rows=keys.rows,
        tokens=longest * (2 if pairs else 1) + (POSITIONS_A_SECOND * recipe.speech.window_seconds if speech else 0),
        checkpointing=keys.gradient_checkpointing,
        width=2 if half else 4,
        targets=math.ceil(longest * share) if writes else 0,
        looked_at=recipe.evaluation.batch_size,
        fused=plain and recipe.task == "text-generation" and size.kind in FUSED,
        head_only=method == "head",
        apart=not pairs,  # of which each competes with the others
        least=keys.batch_size == "auto",
    )


def method_of(recipe: Recipe, new_tokens: Sequence[int | None] = ()) -> Method:
    """The recipe's way of tuning. new_tokens: ids of data.new_tokens, for a model that is to learn them."""
    if recipe.tuning.method == "lora":
        from qft.training.lora import Lora

        keys = recipe.lora.model_dump()
        return Lora(
            **keys,
            seed=recipe.training.seed,
            new_tokens=tuple(number for number in new_tokens if number is not None),
            task_type=find_task(recipe.task).peft_type,
            base=recipe.model,
        )
    from qft.training.methods import Weights

    return Weights(recipe.tuning.method == "head", recipe.quantization.compute_dtype)


def _schedule(recipe: Recipe, how: Choices) -> Any:
    from qft.training.loop import Schedule

    keys = recipe.training
    return Schedule(
        epochs=keys.epochs,
        learning_rate=keys.learning_rate,
        warmup_ratio=keys.warmup_ratio,
        batch_size=how.batch_size,
        gradient_accumulation_steps=how.accumulation,
        weight_decay=keys.weight_decay,
        max_grad_norm=keys.max_grad_norm,
        evaluations=keys.evaluations,
        checkpoint_minutes=keys.checkpoint_minutes,
        seed=keys.seed,
        patience=keys.patience,
    )
