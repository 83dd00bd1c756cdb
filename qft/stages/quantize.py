"""Each target's grid put into the graph: the bundles that ship."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qft.bundle.assets import name_provider
from qft.bundle.golden import as_json
from qft.bundle.manifest import Bundle, size_bytes, update
from qft.files import folder_aside
from qft.measure.classification import Calibration
from qft.measure.quality import Quality
from qft.progress import Progress
from qft.recipe import Recipe
from qft.stages import baseline, export, fold, merge, tune
from qft.stages.job import Job
from qft.targets import Target
from qft.tasks.registry import find_task

NEEDS = ("export", "fold")

_SCANNED_ROWS = 32


@dataclass(frozen=True)
class TargetFacts:
    """One shipped bundle. bits_per_weight: codes, scales and zero points over the quantized weights, all counted once.

    large_activations: of a float16 target, module → its largest output on held-out rows, if that is above 10,000.
    without_kernel: operator → nodes, of those that the target's provider leaves to the processor.
    """

    quality: Quality
    bundle_bytes: int
    quantized_weights: int
    bits_per_weight: float
    calibration: Calibration | None
    large_activations: dict[str, float]
    without_kernel: dict[str, int]


@dataclass(frozen=True)
class Facts:
    """Target name → its bundle."""

    targets: dict[str, TargetFacts]


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result: the profiles' content, not only their names."""
    return {
        "targets": [target.model_dump() for target in recipe.export.chosen()],
        "evaluation": recipe.evaluation.model_dump(),
        "accepted_accuracy": recipe.classification.accepted_accuracy,
    }


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done."""
    graphs = find_task(job.recipe.task).graphs
    targets = job.recipe.export.chosen()
    found = [job.run.bundle(target.name) / "qft.json" for target in targets]
    for target in targets:
        files = target.files(graphs).values()
        found += [job.run.bundle(target.name) / name for file in files for name in (file, f"{file}_data")]
    return found


def run(job: Job) -> Facts:
    """Make every target's bundle."""
    return Facts({target.name: ship(job, target) for target in job.recipe.export.chosen()})


def ship(job: Job, target: Target) -> TargetFacts:
    """Make and measure one target's bundle. Raises StageError if the stages before have not run."""
    from qft.graph.matmulnbits import GraphPlan, quantize_graph
    from qft.quant.grids import grids_of
    from qft.quant.store import load_matrices

    matrices = job.run.fold(target.name) / fold.MATRICES
    folded = load_matrices(matrices) if target in fold.grid_targets(job.recipe) else {}
    with folder_aside(job.run.bundle(target.name)) as aside:
        (aside / "onnx").mkdir()
        files = target.files(job.task.graphs)
        tensors = []
        for graph, part in job.task.graphs.items():
            mine = {
                name.partition(part)[2] if part else name: m
                for name, m in folded.items()
                if _lies_in(name, graph, job.task.graphs)
            }
            tensors += quantize_graph(
                job.run.bundle(export.TARGET) / export.float_files(job.recipe)[graph],
                aside / files[graph],
                GraphPlan(
                    grids_of(target) if target.linear else None,
                    target.accuracy_level,
                    fuse=target.fusions,
                    positions=_positions(job),
                    half=target.half,
                ),
                mine,
                job.on_progress,
            )
        export.describe(job, aside, target=target.name, models=files)
        name_provider(aside, target.provider, target.provider_options)
        update(
            aside,
            quantization=[asdict(tensor) for tensor in tensors],
            before=_before(job, target),
            provider_options={target.provider: target.provider_options},
            half=target.half,
        )
        large = _large_activations(job) if target.half else {}
        if target.half:
            update(aside, large_activations=large)
        without = nodes_without_kernel(target, [aside / name for name in files.values()])
        calibration = _calibration(job, aside)
        quality = export.measure_bundle(job, f"quantize-{target.name}", aside)
        job.on_progress(Progress("golden cases", 0))
        update(aside, golden=as_json(job.task.golden_cases(Bundle.load(aside), job.rows("eval"))))
    weights = sum(t.rows * t.cols for t in tensors)
    return TargetFacts(
        quality,
        size_bytes(job.run.bundle(target.name)),
        weights,
        8 * sum(t.bytes for t in tensors) / weights if weights else 16.0 if target.half else 32.0,
        calibration,
        large,
        without,
    )


def nodes_without_kernel(target: Target, files: list[Path]) -> dict[str, int]:
    """What of the graphs the target's provider cannot run; those of the processor's are not looked at."""
    from qft.graph.providers import count_operators, without_kernel

    found: Counter[str] = sum(map(count_operators, files), Counter()) if target.provider != "cpu" else Counter()
    return {name: found[name] for name in without_kernel(target, found)}


def _positions(job: Job) -> int:
    """The longest text that the model was made for, as its configuration says; 0 if it does not."""
    config = json.loads((job.run.merged / "config.json").read_text("utf-8"))
    return int(config.get("max_position_embeddings") or 0)


def _large_activations(job: Job) -> dict[str, float]:
    """What float16 may not hold, in the merged model on held-out rows."""
    from qft.data.tokenizer import TextTokenizer
    from qft.quant.ranges import large_activations

    tokenizer = TextTokenizer.load(job.run.merged)
    model = job.load(job.run.merged, tokenizer)
    return large_activations(model, job.rows("eval")[:_SCANNED_ROWS], job.task.forward(tokenizer).feed)


def _lies_in(layer: str, graph: str, graphs: Mapping[str, str]) -> bool:
    """Whether a layer is in a graph: the one whose part of the model's names fits best."""
    return graph == max(graphs, key=lambda name: len(graphs[name]) if graphs[name] in layer else -1)


def _calibration(job: Job, folder: Path) -> Calibration | None:
    found = job.task.calibrate(
        Bundle.load(folder), job.rows("validation"), job.rows("eval"), batch_size=job.recipe.evaluation.batch_size
    )
    if found is not None:
        update(folder, calibration=asdict(found))
    return found


def _before(job: Job, target: Target) -> dict[str, Any]:
    """Quality on the same rows after each stage before this one, for qft.json."""
    found = {
        name: asdict(job.facts(kind).quality)  # type: ignore[attr-defined]
        for name, kind in (
            ("base", baseline.Facts),
            ("tuned", tune.Facts),
            ("merged", merge.Facts),
            ("exported", export.Facts),
        )
        if job.run.record(kind.__module__.rpartition(".")[2])
    }
    folded = job.facts(fold.Facts).targets.get(target.name)
    return found | ({"rounded": asdict(folded.rounded), "folded": asdict(folded.quality)} if folded else {})
