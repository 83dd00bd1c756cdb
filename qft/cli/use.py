"""A bundle in use: ask it, measure it, check it. None of these imports torch."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from qft.bundle.chat import Conversation
from qft.bundle.golden import LEAST_COSINE, Agreement, check_cases, from_manifest
from qft.bundle.manifest import Bundle, size_bytes
from qft.bundle.sampling import SAMPLING_NAMES, Sampling
from qft.cli.options import find_run, made_job, on_runs, shared
from qft.console import Screen, print_json, print_line, print_piece, print_served, print_table, typed_lines
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

_SAMPLING: list[tuple[str, type, str]] = [
    ("temperature", float, "How much chance there is in an answer. Default: 0, none; 1 if the choice is narrowed."),
    ("top_k", int, "Choose among so many of the likeliest tokens."),
    ("top_p", float, "Choose among the likeliest tokens that together have this share."),
    ("min_p", float, "Choose among tokens at least this share as likely as the likeliest."),
    ("repetition_penalty", float, "Above 1: what was said before becomes less likely."),
    ("seed", int, "The same seed makes the same choices."),
]


def _on_bundle(function: Any) -> Any:
    function = click.option(
        "--bundle",
        "bundle_name",
        metavar="BUNDLE|RUN",
        help="A bundle's folder or a run; default: the newest run's first target.",
    )(function)
    return on_runs(shared(function))


def _sampled(function: Any) -> Any:
    """--temperature … --seed and --stop, which become `sampling` and `stop`."""

    @functools.wraps(function)
    def command(stop: tuple[str, ...], **options: Any) -> Any:
        sampling = Sampling.asked(**{name: options.pop(name) for name in SAMPLING_NAMES})
        return function(stop=stop, sampling=sampling, **options)

    for name, kind, text in reversed(_SAMPLING):
        command = click.option(f"--{name.replace('_', '-')}", type=kind, help=text)(command)
    return click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before this text; repeatable.")(
        command
    )


def open_bundle(name: str | None, runs: Path) -> Bundle:
    """The bundle that a user names by its folder or its run; None: of the newest run."""
    if name is not None and (Path(name) / "qft.json").exists():
        return Bundle.load(Path(name))
    run = find_run(name, runs)
    folder = run.bundle(made_job(run).recipe.export.targets[0])
    if not folder.exists():
        raise InputError(f"{run.root} has no bundle yet", hint=f"make it with `qft export --onnx {run.root}`")
    return Bundle.load(folder)


@click.command("predict")
@click.argument("texts", nargs=-1)
@click.option("--max-new-tokens", default=64, show_default=True, help="Longest answer.")
@click.option("--labels", metavar="A,B,C", help="Choose one of these; default: of those it was tuned on, if it was.")
@click.option("--schema", type=click.Path(path_type=Path), help="JSON Schema file that every answer is kept to.")
@click.option("--among", type=click.Path(path_type=Path), help="Text file: the lines nearest to each text are given.")
@_sampled
@_on_bundle
def predict_command(
    texts: tuple[str, ...],
    max_new_tokens: int,
    labels: str | None,
    schema: Path | None,
    among: Path | None,
    sampling: Sampling,
    stop: tuple[str, ...],
    bundle_name: str | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Answer TEXTS, or the lines of stdin, with a bundle; the recipe's prompt is put around each.

    A line may be a conversation: {"messages": […], "tools": […]}, as JSON. A bundle that finds answers in a context is asked
    with JSON lines: {"question": "…", "context": "…"}; one that writes down speech with the names of sound files; one for search
    gives a text's vector or, with --among, what it finds.
    """
    if labels and schema:
        raise InputError("an answer is kept to labels or to a schema", where="--labels, --schema", hint="leave one out")
    bundle = open_bundle(bundle_name, runs)
    lines = list(texts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise InputError("nothing to answer", hint='as in `qft predict "A waste of two hours."`')
    answers = bundle.predict(
        lines,
        bundle.runner(),
        max_new_tokens=max_new_tokens,
        labels=[name.strip() for name in labels.split(",")] if labels else (),
        schema=_schema(schema) if schema else None,
        sampling=sampling,
        stop=stop,
        among=_lines(among) if among else (),
    )
    if as_json:
        said = [asdict(answer) for answer in answers]
        print_json({"answers": [{"input": line, **answer} for line, answer in zip(lines, said, strict=True)]})
    else:
        for answer in answers:
            print_line(str(answer))


def _schema(path: Path) -> Any:
    try:
        return json.loads(_read(path, "--schema"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", where="--schema") from None


def _lines(path: Path) -> list[str]:
    if not (lines := [line for line in _read(path, "--among").splitlines() if line.strip()]):
        raise InputError(f"{path} holds no line", where="--among", hint="write a text a line")
    return lines


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", where=option) from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8", where=option) from None


@click.command("chat")
@click.option("--system", help="Other words than the recipe's to open the conversation with.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Longest answer.")
@_sampled
@_on_bundle
def chat_command(
    system: str | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[str, ...],
    bundle_name: str | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Talk with a bundle: a line is what you say. Ctrl-C stops an answer, Ctrl-D ends; stdin may be a file of lines."""
    bundle = open_bundle(bundle_name, runs)
    conversation = Conversation(bundle, bundle.runner(), system=system, sampling=sampling, stop=stop)
    for line in typed_lines("› "):
        try:
            for piece in conversation.say(line, max_new_tokens=max_new_tokens):
                if not as_json:
                    print_piece(piece)
        except KeyboardInterrupt:
            pass  # what was said so far stays in the conversation
        if not as_json:
            print_line("" if conversation.turns[-1].ended else " …")
    if as_json:
        print_json({"turns": [asdict(turn) for turn in conversation.turns], "forgotten": conversation.forgotten})


@click.command("serve")
@click.argument("bundle_name", required=False, metavar="[BUNDLE|RUN]")
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
@on_runs
@shared
def serve_command(
    bundle_name: str | None,
    host: str,
    port: int,
    key: str | None,
    max_new_tokens: int,
    queue: int,
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
@_on_bundle
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
            hint="copy its run's run.json and recipe.yaml with it, or name the run with --bundle",
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
@_on_bundle
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
