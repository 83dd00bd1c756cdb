"""Everything that was found out, in one self-contained page; also what the screen and --json show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from qft.files import write_text
from qft.measure.classification import per_label
from qft.measure.machine import Machine
from qft.measure.scores import score_of
from qft.measure.slices import Slice, slices
from qft.recipe import Recipe
from qft.report.summary import Asked, Examples, LabelResults, Summary, TargetSize, Training, WaterfallStep
from qft.report.words import Knobs
from qft.stages import baseline, bench, export, fold, merge, prepare, quantize, tune, verify
from qft.stages.carried import carried
from qft.stages.held_out import asked, cuts, labels_of
from qft.stages.job import Job

# A report on half a run is still a report: it stands on what there is.
NEEDS: tuple[str, ...] = ()

_SHOWN_EXAMPLES = 6
_SHOWN_HARDEST = 10
_Facts = TypeVar("_Facts")


@dataclass(frozen=True)
class Facts:
    """Where the page lies, and the metric on parts of the held-out rows."""

    path: str
    slices: list[Slice] = field(default_factory=list)


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What the page looks at; it is made anew each time all the same."""
    return {"report": recipe.report.model_dump()}


def outputs(job: Job) -> list[Path]:
    """The page."""
    return [job.run.report]


def run(job: Job) -> Facts:
    """Write report.html."""
    from qft.report.page import render

    target, keys = job.recipe.export.targets[0], job.recipe
    shipped = _maybe(job, quantize.Facts) is not None
    rows = asked(job, target) if shipped else []
    summary = summarize(job, rows)
    found = _slices(job, summary.slice_metric, rows)
    knobs = Knobs(
        keys.training.epochs,
        keys.fold.steps,
        keys.quantization.grid,
        keys.export.targets,
        keys.classification.class_weights,
        keys.training.max_length,
    )
    page = render(replace(summary, slices=found), knobs, carried(job, target) if rows else [])
    write_text(job.run.report, page)
    return Facts(str(job.run.report), found)


def summarize(job: Job, rows: Sequence[Asked] = ()) -> Summary:
    """Gather what the stages found out; a stage that has not run leaves its part empty. rows: what `asked` gives, for examples."""
    content = job.run.load()
    stages = {name: job.run.record(name) for name in content["stages"]}
    prepared, tuned, merged = _maybe(job, prepare.Facts), _maybe(job, tune.Facts), _maybe(job, merge.Facts)
    exported, shipped = _maybe(job, export.Facts), _maybe(job, quantize.Facts)
    folded = _maybe(job, fold.Facts)
    verified, benched, reported = _maybe(job, verify.Facts), _maybe(job, bench.Facts), _maybe(job, Facts)
    target = job.recipe.export.targets[0]
    sizes = {"float": TargetSize(exported.bundle_bytes, None)} if exported else {}
    left = benched.on_cpu if benched else {}
    tried = benched.threads_tried if benched else {}
    sizes |= {
        name: TargetSize(
            t.bundle_bytes,
            t.bits_per_weight,
            t.large_activations,
            t.without_kernel,
            left.get(name, {}),
            tried.get(name, {}),
        )
        for name, t in (shipped.targets if shipped else {}).items()
    }
    verify_record = stages.get("verify")
    return Summary(
        name=job.recipe.name,
        task=job.recipe.task,
        recipe_text=job.run.recipe.read_text("utf-8"),
        run_folder=str(job.run.root),
        overrides=content.get("overrides", []),
        headline_target=target,
        waterfall=_waterfall(job),
        stage_seconds={name: r.seconds for name, r in stages.items() if r and name != "report"},
        stage_memory_bytes={name: r.peak_memory_bytes for name, r in stages.items() if r and name != "report"},
        stage_energy={name: r.energy for name, r in stages.items() if r and r.energy and name != "report"},
        sources=[vars(s) for s in [prepared.model, *prepared.data]] if prepared else [],
        data=prepared.report if prepared else None,
        majority_percent=prepared.majority_percent if prepared else None,
        training=_training(job, tuned) if tuned else None,
        merge_way=merged.way if merged else None,
        merge_losses=merged.validation_losses if merged else {},
        finer_layers=folded.targets[target].finer_layers if folded and target in folded.targets else {},
        sizes=sizes,
        speeds=benched.targets if benched else {},
        float_parity=verified.float_parity if verified else None,
        parities=verified.targets if verified else {},
        worse=verified.worse if verified else {},
        budget=job.recipe.export.budget.max_worse,
        problems=verify_record.problems if verify_record else [],
        machine=TypeAdapter(Machine).validate_python(content["machine"]) if "machine" in content else None,
        versions=content.get("versions", {}),
        examples=_examples(rows),
        labels=_labels(job, target, shipped) if shipped else None,
        slices=reported.slices if reported else [],
    )


def _maybe(job: Job, kind: type[_Facts]) -> _Facts | None:
    return job.facts(kind) if job.run.record(kind.__module__.rpartition(".")[2]) else None


def _waterfall(job: Job) -> list[WaterfallStep]:
    steps = []
    for name, kind in (
        ("base", baseline.Facts),
        ("tuned", tune.Facts),
        ("merged", merge.Facts),
        ("exported", export.Facts),
    ):
        if (facts := _maybe(job, kind)) is not None:
            steps.append(WaterfallStep(name, facts.quality))  # type: ignore[attr-defined]
    if (folded := _maybe(job, fold.Facts)) is not None:
        for name, target in folded.targets.items():
            steps += [WaterfallStep("rounded", target.rounded, name), WaterfallStep("folded", target.quality, name)]
    if (shipped := _maybe(job, quantize.Facts)) is not None:
        steps += [WaterfallStep("shipped", facts.quality, name) for name, facts in shipped.targets.items()]
    return steps


def _training(job: Job, facts: tune.Facts) -> Training:
    metrics = job.run.metrics
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()] if metrics.exists() else []
    curve = [(line["step"], line["loss"], line.get("validation_loss")) for line in lines]
    return Training(
        facts.steps,
        facts.tokens,
        facts.seconds,
        facts.tokens_per_second,
        facts.best_step,
        facts.trainable_parameters,
        curve,
    )


def _examples(rows: Sequence[Asked]) -> Examples:
    answered = [row for row in rows if row.shipped.asked]
    right, wrong = ([row for row in answered if row.shipped.right is flag] for flag in (True, False))
    hardest = sorted(rows, key=lambda row: -row.shipped.loss)
    return Examples(right[:_SHOWN_EXAMPLES], wrong[:_SHOWN_EXAMPLES], hardest[:_SHOWN_HARDEST])


def _slices(job: Job, metric: str, rows: Sequence[Asked]) -> list[Slice]:
    answers = [row.shipped for row in rows]
    score = score_of(metric, answers) if rows else None
    return slices(metric, score, answers, cuts(job, rows)) if score else []


def _labels(job: Job, target: str, shipped: quantize.Facts) -> LabelResults | None:
    answers, labels = job.answers(f"quantize-{target}"), labels_of(job)
    if not answers or target not in shipped.targets or shipped.targets[target].calibration is None:
        return None
    named = {name for one in answers for said in (one.expected, one.answer) for name in labels.named_in(said)}
    if not named <= set(labels.names):  # the rows that lie there by now have others
        return None
    mistaken = Counter((a.expected, a.answer) for a in answers if not a.right)
    return LabelResults(
        per_label(answers, labels),
        [] if labels.several else [(expected, said, rows) for (expected, said), rows in mistaken.most_common()],
        shipped.targets[target].calibration,
    )
