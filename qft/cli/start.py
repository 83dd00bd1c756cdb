"""Before a run: the keys, the rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qft import recipe_reference
from qft.cli.options import on_job, open_job, shared
from qft.console import Screen, print_json, print_line, print_marked, print_table
from qft.data.inspect import DataReport
from qft.device import Choices
from qft.licences import warning
from qft.measure.speed import mb

if TYPE_CHECKING:
    from qft.stages import prepare
    from qft.stages.job import Job
    from qft.training.trial import Trial

_SHOWN_ROWS = 3
_SHOWN_LABELS = 12


@click.command("plan")
@click.option("--try", "tries", is_flag=True, help="Do a few steps, which takes a minute: how long all of them will.")
@on_job(required=False)
def plan_command(tries: bool, arguments: tuple[str, ...], runs: Path, as_json: bool) -> None:
    """Prepare the rows and show three of them with what is in the loss, and the stages a run would do.

    Stops if no token is in the loss, or all of them are.
    """
    screen = Screen(quiet=as_json)
    with screen.shown(), open_job(arguments, runs=runs, required=False, on_progress=screen.on_progress) as job:
        plan = _planned(job, screen, tries=tries)
    if as_json:
        print_json(plan.as_dict())
    else:
        _show(plan)


@dataclass(frozen=True)
class _Plan:
    """What would be done. run_bytes: predicted of the whole run. without_kernel: target → operators its provider lacks."""

    facts: prepare.Facts
    how: Choices
    run_bytes: int
    trial: Trial | None
    without_kernel: dict[str, list[str]]
    stages: list[str]
    rows: list[tuple[str, list[tuple[str, bool]]]]

    @property
    def sources(self) -> list[prepare.SourceFact]:
        """The model, and what rows come from."""
        return [self.facts.model, *self.facts.data]

    @property
    def warnings(self) -> list[str]:
        """Of the rows, then of licences, then of targets."""
        licences = [warning(source.uri, source.licence) for source in self.sources]
        targets = [
            f"{name}: its provider has no kernel for {', '.join(operators)}, which onnxruntime then runs on the processor"
            for name, operators in self.without_kernel.items()
        ]
        return [*self.facts.report.warnings(), *dict.fromkeys(filter(None, licences)), *targets]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "data": asdict(self.facts.report),
            "warnings": self.warnings,
            "sources": [asdict(source) for source in self.sources],
            "stages": self.stages,
            "tuning": asdict(self.how),
            "trial": None if self.trial is None else asdict(self.trial),
            "predicted_run_bytes": self.run_bytes,
            "rows": [
                {"where": where, "runs": [{"text": text, "in_loss": flag} for text, flag in runs]}
                for where, runs in self.rows
            ],
        }


def _planned(job: Job, screen: Screen, *, tries: bool) -> _Plan:
    from qft import pipeline
    from qft.data.tokenizer import TextTokenizer
    from qft.device_memory import ModelSize
    from qft.graph.providers import lacking
    from qft.known_bases import run_bytes
    from qft.stages import prepare, tune

    pipeline.run(job, ["prepare"], on_stage=screen.on_stage)
    facts, marks = job.facts(prepare.Facts), pipeline.fingerprints(job)
    tokenizer = TextTokenizer.load(facts.base_folder)
    return _Plan(
        facts,
        tune.choices(job),
        run_bytes(ModelSize.of(facts.base_folder).weights),
        tune.trial(job) if tries else None,
        lacking(job.recipe.export.chosen()),
        [stage for stage in pipeline.STAGES if not pipeline.is_done(job, stage, marks[stage])],
        [(row.where, job.task.marked(row, tokenizer)) for row in job.rows("train")[:_SHOWN_ROWS]],
    )


def _show(plan: _Plan) -> None:
    memory = ("memory", f"about {mb(plan.run_bytes)} for the whole run")
    learning = [] if plan.trial is None else [("learning", _trial_text(plan.trial))]
    print_table("rows", [*_rows_lines(plan.facts.report), ("tuned on", _tuning_text(plan.how)), *learning, memory])
    for text in plan.warnings:
        print_line(f"\nwarning: {text}")
    print_line("\nThree rows; what is in the loss is marked:\n")
    print_marked(plan.rows)
    print_line(f"stages to do: {', '.join(plan.stages)}")


def _rows_lines(report: DataReport) -> list[tuple[str, str]]:
    """What became of the rows that were read."""
    return [
        (
            "read",
            f"{report.rows_read:,}: {report.empty:,} empty, {report.in_no_bin:,} in no bin, {report.duplicates:,} exact "
            f"duplicates, {report.conflicts:,} with an answer that contradicts another row",
        ),
        *_leaks(report),
        *_alone(report),
        ("labels", _labels_text(report.labels)),
        *((f"weight {m.weight:g}", f"{m.source}: {m.rows:,} rows to learn → {m.mixed_rows:,}") for m in report.mixed),
        (
            "used",
            f"{report.train_rows:,} to learn{_changed_text(report)}, {report.validation_rows:,} to choose, "
            f"{report.eval_rows:,} to test",
        ),
        (
            "tokens",
            f"{report.train_tokens:,} to learn from, {report.train_target_tokens:,} of them in the loss; a row has "
            f"{report.length_median} (median), {report.length_95_percent} (95 %), {report.length_longest} (longest)",
        ),
        (
            "lost",
            f"{report.shortened:,} prompts shortened and {report.cut:,} rows cut by max_length, "
            f"{report.nothing_in_loss:,} dropped for it, {report.unknown_tokens:,} unknown tokens",
        ),
    ]


def _trial_text(trial: Trial) -> str:
    return (
        f"about {trial.seconds / 60:.1f} minutes for {trial.steps:,} steps, at {trial.tokens_per_second:,.0f} tokens/s here; "
        f"{mb(trial.peak_memory_bytes)} at the peak"
    )


def _tuning_text(how: Choices) -> str:
    """On what and how, and what differs from the recipe."""
    where = f"{'the processor' if how.device == 'cpu' else how.device}, {mb(how.predicted_bytes)} predicted at the peak"
    rows = f"{how.batch_size} rows at once" + (f", {how.accumulation} times a step" if how.accumulation > 1 else "")
    kind = f"{how.dtype}{' with the loss scaled' if how.loss_scaling else ''}" if how.dtype != "auto" else ""
    return "; ".join(filter(None, [where, rows, kind, *how.notes]))


def _leaks(report: DataReport) -> list[tuple[str, str]]:
    if not report.also_in_train and not report.leaked:
        return []
    text = f"{report.also_in_train:,} held-out rows are also among the rows to learn, where {report.leaked:,} were left out"
    return [("on both sides", text)]


def _alone(report: DataReport) -> list[tuple[str, str]]:
    if not report.without_group:
        return []
    text = f"{report.without_group:,} rows have no value in data.group_column: each stands alone, on either side"
    return [("in no group", text)]


def _changed_text(report: DataReport) -> str:
    copies = f" ({report.changed_copies:,} of them changed copies)" if report.changed_copies else ""
    return copies + (" (heard otherwise each time)" if report.heard_changed else "")


def _labels_text(labels: dict[str, int]) -> str:
    often = sorted(labels.items(), key=lambda pair: -pair[1])
    if len(often) > _SHOWN_LABELS:
        shown = ", ".join(f"{label} {count:,}" for label, count in often[:2])
        return f"{len(often)}: {shown} … {often[-1][0]} {often[-1][1]:,}"
    return ", ".join(f"{label} {count:,}" for label, count in often) or "none"


@click.command("schema")
@click.option("--json-schema", is_flag=True, help="JSON Schema, for editors that complete and check YAML.")
@shared
def schema_command(json_schema: bool, as_json: bool) -> None:
    """List every recipe key with its type, default and meaning."""
    if json_schema or as_json:
        print_json(recipe_reference.json_schema())
    else:
        print_line(recipe_reference.reference_markdown())
