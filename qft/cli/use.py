"""A bundle in use: ask it, measure it, check it. None of these imports torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from qft.bundle.chat import Conversation
from qft.bundle.golden import LEAST_COSINE, Agreement, check_cases, from_manifest
from qft.bundle.manifest import Bundle, size_bytes
from qft.bundle.sampling import Sampling
from qft.cli import forget_interrupt
from qft.cli.bundles import on_bundle, open_bundle, sampled
from qft.cli.options import made_job
from qft.console import (
    Screen,
    print_json,
    print_line,
    print_piece,
    print_problems,
    print_served,
    print_table,
    typed_lines,
)
from qft.data.examples import to_examples
from qft.data.labelled import LabelSet
from qft.data.rows import read_rows
from qft.errors import InputError, StageError
from qft.measure.quality import Measuring
from qft.measure.speed import mb
from qft.progress import silent
from qft.report.summary import WaterfallStep, metric_name, value_text
from qft.runfolder import RunFolder
from qft.stages.baseline import base_runner
from qft.stages.job import Job, make_task
from qft.stages.prepare import audio_folders, layout_of, shape_of
from qft.tasks.registry import Task


@click.command("chat")
@click.option("--system", help="Other words than the recipe's to open the conversation with.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Longest answer.")
@sampled
@on_bundle
def chat_command(
    system: str | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[str, ...],
    bundle_name: str | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Talk with a BUNDLE (default: the newest run's first target): a line is what you say; stdin may be a file of lines.

    Ctrl-C stops an answer, and the next line is read; at the mark it ends the dialogue, as Ctrl-D does.
    """
    bundle, refused = open_bundle(bundle_name, runs), False
    conversation = Conversation(bundle, bundle.runner(), system=system, sampling=sampling, stop=stop)
    for line in typed_lines("› "):
        try:
            for piece in conversation.say(line, max_new_tokens=max_new_tokens):
                if not as_json:
                    print_piece(piece)
        except InputError as error:  # of this line; what was said before stays
            refused = True
            print_problems(map(str, error.problems))
            continue
        except KeyboardInterrupt:  # what was said so far stays in the conversation
            forget_interrupt()
        if not as_json:
            print_line("" if conversation.turns[-1].ended else " …")
    if as_json:
        print_json({"turns": [asdict(turn) for turn in conversation.turns], "forgotten": conversation.forgotten})
    if refused and not sys.stdin.isatty():
        sys.exit(InputError.exit_code)


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; a wider one needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--key", envvar="QFT_KEY", help="What clients must send as API key; better set QFT_KEY, which `ps` does not show."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Longest answer that may be asked for.",
)
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Requests that may wait; others are answered 429.",
)
@on_bundle
def serve_command(
    host: str,
    port: int,
    key: str | None,
    max_new_tokens: int,
    queue: int,
    bundle_name: str | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Answer programs over HTTP as OpenAI does, with a BUNDLE (default: the newest run's first target). Ctrl-C ends.

    Language models answer /v1/chat/completions and /v1/completions, recognisers /v1/audio/transcriptions, models
    for search /v1/embeddings; the others /classify, /translate, /answer. The page at / tries them out.
    """
    from qft.serve.run import serve

    bundle = open_bundle(bundle_name, runs)

    def on_ready(url: str, service: Any) -> None:
        print_served(url, service.card, as_json=as_json)

    serve(bundle, host=host, port=port, key=key, waiting=queue, most_tokens=max_new_tokens, on_ready=on_ready)


@click.command("eval")
@click.option("--rows", type=click.Path(path_type=Path, exists=True), help="Rows of your own, in the recipe's format.")
@click.option("--base", is_flag=True, help="Measure the untouched base model instead, to see what tuning changed.")
@on_bundle
def eval_command(rows: Path | None, base: bool, bundle_name: str | None, runs: Path, as_json: bool) -> None:
    """Measure a bundle again: on the run's held-out rows, or on ROWS it has never seen."""
    bundle = open_bundle(bundle_name, runs)
    job, task = _made_by(bundle)
    recipe, held_out = job.recipe, _held_out(bundle, rows, job, task)
    screen = Screen(quiet=as_json)
    with screen.shown():
        quality, answers = task.measure(
            base_runner(job) if base else bundle.runner(),
            held_out,
            bundle.tokenizer,
            Measuring(**recipe.evaluation.model_dump(), on_progress=screen.on_progress),
        )
    measured = f"the base of {job.run.root}" if base else str(bundle.folder)
    if as_json:
        print_json({"bundle": measured, "quality": asdict(quality), "answers": [asdict(a) for a in answers]})
        return
    shown = {name: cell for name, cell in WaterfallStep("eval", quality).cells().items() if cell != "–"}
    headline = (metric_name(quality.metric), value_text(quality.metric, quality.value))
    print_table(measured, [headline, ("rows", f"{quality.rows:,}"), *shown.items()])


def _made_by(bundle: Bundle) -> tuple[Job, Task]:
    """The job and task of the run that a bundle lies in."""
    run = bundle.folder.parent.parent
    if not (run / "run.json").exists():
        raise InputError(
            f"{bundle.folder} does not lie in a run folder, so its recipe is not known",
            hint="copy its run's run.json and recipe.yaml with it, or name the run",
        )
    labels = LabelSet(tuple(bundle.manifest["labels"]), (), bundle.manifest["several_labels"], 0)
    job = made_job(RunFolder(run))
    return job, make_task(job.recipe, labels)


def _held_out(bundle: Bundle, rows: Path | None, job: Job, task: Task) -> list[Any]:
    recipe = job.recipe
    if rows is None:
        lines = (bundle.folder.parent.parent / "data/eval.jsonl").read_text("utf-8").splitlines()
        return [task.read(json.loads(line)) for line in lines]
    shape = replace(shape_of(recipe, [rows, *audio_folders(job)]), group_column=None)  # that matters to splits alone
    examples, _ = to_examples(read_rows(rows, **layout_of(recipe)), shape)
    length = recipe.training.max_length
    return task.encode(examples, bundle.tokenizer, max_length=length, on_progress=silent)[0]


def _agreed(found: Agreement, bundle: Bundle) -> str:
    if bundle.embeds:
        return f"{found.agreement:.1%} of {found.positions} vectors lie within a cosine of {LEAST_COSINE} of theirs"
    return (
        f"same first choice at {found.agreement:.1%} of {found.positions} positions; "
        f"{found.free_cases - found.free_differences} of {found.free_cases} texts equal"
    )


@click.command("check")
@on_bundle
def check_command(bundle_name: str | None, runs: Path, as_json: bool) -> None:
    """Compare every file with its hash and every golden case with what this machine computes."""
    bundle = open_bundle(bundle_name, runs)
    problems = bundle.problems()
    if problems:
        raise StageError(problems)
    agreement = check_cases(
        bundle.runner(), from_manifest(bundle.manifest), folder=bundle.folder, stop_ids=bundle.stop_ids
    )
    if as_json:
        print_json({"bundle": str(bundle.folder), "agrees": agreement.agrees, **asdict(agreement)})
    else:
        print_table(
            str(bundle.folder),
            [
                ("files", f"{len(bundle.manifest['files'])}, {mb(size_bytes(bundle.folder))}, all as they were made"),
                ("golden cases", _agreed(agreement, bundle)),
            ],
        )
    if not agreement.agrees:
        raise StageError(
            f"this runtime does not agree with the golden cases: {agreement.clear_differences} clear choices differ",
            hint="another onnxruntime version or processor may compute differently; see `qft doctor`",
        )
