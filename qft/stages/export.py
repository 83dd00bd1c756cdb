"""The merged model as a float ONNX bundle, through the recipe's exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qft.bundle.assets import copy_tokenizer
from qft.bundle.feeding import Feeding
from qft.bundle.manifest import Bundle, size_bytes, update
from qft.bundle.session import open_session
from qft.data.language import language_of
from qft.data.tokenizer import TextTokenizer
from qft.files import folder_aside, sha256_file
from qft.measure.machine import versions
from qft.measure.quality import Quality
from qft.recipe import Recipe
from qft.stages import prepare, tune
from qft.stages.job import Job, task_keys
from qft.stages.prepare import shape_of
from qft.targets import Target
from qft.tasks.registry import find_task

NEEDS = ("prepare", "merge")

TARGET = "float"
_LANGUAGE_ROWS = 200


@dataclass(frozen=True)
class Facts:
    """Quality of the float bundle under onnxruntime, and its size.

    without_kernel: target → operators of the model, or of what the target asks for, that its provider lacks.
    """

    quality: Quality
    bundle_bytes: int
    without_kernel: dict[str, list[str]] = field(default_factory=dict)


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result."""
    targets = recipe.export.chosen()
    return {
        "exporter": recipe.export.exporter,
        "evaluation": recipe.evaluation.model_dump(),
        "opset": lowest_opset(targets),
        "providers": {target.name: target.provider for target in targets if target.provider != "cpu"},
    }


def lowest_opset(targets: list[Target]) -> int:
    """Of the one graph that all targets are made of."""
    return min(target.opset for target in targets)


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done."""
    files = float_files(job.recipe).values()
    return [job.run.bundle(TARGET) / name for name in ("qft.json", *files, *(f"{file}_data" for file in files))]


def float_files(recipe: Recipe) -> dict[str, str]:
    """Graph → its file inside the float bundle."""
    return {graph: f"onnx/{graph}.onnx" for graph in find_task(recipe.task).graphs}


def run(job: Job) -> Facts:
    """Export, describe, measure."""
    from qft.graph.exporters import find_exporter
    from qft.graph.providers import lacking

    export, targets = find_exporter(job.recipe.export.exporter, job.recipe.task), job.recipe.export.chosen()
    with folder_aside(job.run.bundle(TARGET)) as aside:
        (aside / "onnx").mkdir()
        export(
            job.run.merged,
            aside / "onnx",
            graphs=job.task.graphs,
            export_task=job.task.export_task,
            opset=lowest_opset(targets),
            on_progress=job.on_progress,
        )
        describe(job, aside, target=TARGET, models=float_files(job.recipe))
        found = lacking(targets, Bundle.load(aside).models.values())
        quality = measure_bundle(job, "export", aside)
    return Facts(quality, size_bytes(job.run.bundle(TARGET)), found)


def describe(job: Job, folder: Path, *, target: str, models: Mapping[str, str]) -> None:
    """Everything beside the graphs: tokenizer, the runtimes' configs, and qft.json with task, licence and lineage.

    models: graph → its file. Inputs and outputs written down are those of the last graph, which gives the answer.
    """
    facts, recipe = job.facts(prepare.Facts), job.recipe
    copy_tokenizer(job.run.merged, folder)
    tokenizer = TextTokenizer.load(folder)
    *_, model = models.values()
    session, _ = open_session(folder / model, threads=0, provider="cpu")
    update(
        folder,
        format=1,
        name=recipe.name,
        target=target,
        task=recipe.task,
        ort_class=job.task.ort_class,
        model=model,
        models=dict(models),
        labels=facts.labels.names,
        several_labels=facts.labels.several,
        keys=task_keys(recipe),
        max_length=recipe.training.max_length,
        prompt=recipe.data.prompt,
        column=facts.prompt_column or shape_of(recipe, ()).asked,
        system=recipe.data.system,
        inputs=[i.name for i in session.get_inputs()],
        outputs=[o.name for o in session.get_outputs()],
        licence=facts.model.licence,
        language=_languages(job, tokenizer),
        lineage={
            "base_model": asdict(facts.model),
            "data": [asdict(s) for s in facts.data],
            "recipe_sha256": sha256_file(job.run.recipe),
            "adapter_steps": job.facts(tune.Facts).steps,
            "versions": versions(),
        },
    )
    job.task.describe(job.run.merged, folder, models, session, tokenizer)
    update(folder, feeding=asdict(Feeding.of(Bundle.load(folder))))


def _languages(job: Job, tokenizer: TextTokenizer) -> list[str]:
    """Of what is asked and of what is answered, as far as they can be told; a label or a file's name is in none."""
    rows, said = job.rows("eval")[:_LANGUAGE_ROWS], job.answers("tune")[:_LANGUAGE_ROWS]
    texts = [] if job.recipe.task == "automatic-speech-recognition" else [job.task.asked(rows, tokenizer)]
    texts += [] if job.facts(prepare.Facts).labels.names else [[answer.expected for answer in said]]
    return list(dict.fromkeys(filter(None, map(language_of, texts))))


def measure_bundle(job: Job, stage: str, folder: Path) -> Quality:
    """Quality of a bundle under onnxruntime, written into its qft.json."""
    bundle = Bundle.load(folder)
    quality = job.measure(stage, bundle.runner(), bundle.tokenizer)
    update(folder, quality=asdict(quality))
    return quality
