"""A bundle in use: ask it, measure it, check it. None of these imports torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qft.bundle.golden import check_cases, from_manifest
from qft.bundle.manifest import Bundle, size_bytes
from qft.cli.options import find_run, on_runs, shared
from qft.console import Screen, print_json, print_line, print_table, value_text
from qft.data.encode import Encoded, encode_all
from qft.data.examples import Shape, to_examples
from qft.data.rows import read_rows
from qft.errors import InputError, StageError
from qft.measure.quality import measure
from qft.recipe_loader import load_recipe
from qft.report.summary import mb, percent


def _on_bundle(function: Any) -> Any:
    function = click.option(
        "--bundle",
        "bundle_name",
        metavar="BUNDLE|RUN",
        help="A bundle's folder or a run; default: the newest run's first target.",
    )(function)
    return on_runs(shared(function))


def _open(name: str | None, runs: Path) -> Bundle:
    if name is not None and (Path(name) / "qft.json").exists():
        return Bundle.load(Path(name))
    run = find_run(name, runs)
    recipe = load_recipe(run.recipe, [*run.load().get("overrides", []), f"name={run.name}"]).recipe
    folder = run.bundle(recipe.export.targets[0])
    if not folder.exists():
        raise InputError(f"{run.root} has no bundle yet", hint=f"make it with `qft export --onnx {run.root}`")
    return Bundle.load(folder)


@click.command("predict")
@click.argument("texts", nargs=-1)
@click.option("--max-new-tokens", default=64, show_default=True, help="Longest answer.")
@_on_bundle
def predict_command(
    texts: tuple[str, ...], max_new_tokens: int, bundle_name: str | None, runs: Path, as_json: bool
) -> None:
    """Answer TEXTS, or the lines of stdin, with a bundle; the recipe's prompt is put around each."""
    bundle = _open(bundle_name, runs)
    lines = list(texts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise InputError("nothing to answer", hint='as in `qft predict "A waste of two hours."`')
    answers = bundle.answer(lines, bundle.runner(), max_new_tokens=max_new_tokens)
    if as_json:
        print_json({"answers": [{"text": line, **asdict(answer)} for line, answer in zip(lines, answers, strict=True)]})
    else:
        for answer in answers:
            print_line(answer.text)


@click.command("eval")
@click.option("--rows", type=click.Path(path_type=Path, exists=True), help="Rows of your own, in the recipe's format.")
@_on_bundle
def eval_command(rows: Path | None, bundle_name: str | None, runs: Path, as_json: bool) -> None:
    """Measure a bundle again: on the run's held-out rows, or on ROWS it has never seen."""
    bundle = _open(bundle_name, runs)
    held_out, keys = _held_out(bundle, rows)
    screen = Screen(quiet=as_json)
    with screen.shown():
        quality, answers = measure(
            bundle.runner(),
            held_out,
            bundle.tokenizer,
            metric=keys.metric,
            batch_size=keys.batch_size,
            extra_tokens=keys.extra_tokens,
            on_progress=screen.on_progress,
        )
    if as_json:
        print_json({"bundle": str(bundle.folder), "quality": asdict(quality), "answers": [asdict(a) for a in answers]})
        return
    print_table(
        str(bundle.folder),
        [
            (quality.metric, value_text(quality.metric, quality.value)),
            ("rows", f"{quality.rows:,}"),
            ("loss", f"{quality.loss:.4f} nats a target token"),
            ("perplexity", f"{quality.perplexity:.3f}"),
            ("one of the labels", percent(quality.label_percent)),
            ("ended by itself", percent(quality.ended_percent)),
        ],
    )


def _held_out(bundle: Bundle, rows: Path | None) -> tuple[list[Encoded], Any]:
    run = bundle.folder.parent.parent
    if not (run / "run.json").exists():
        raise InputError(
            f"{bundle.folder} does not lie in a run folder, so its recipe is not known",
            hint="copy its run's run.json and recipe.yaml with it, or name the run with --bundle",
        )
    overrides = json.loads((run / "run.json").read_text("utf-8")).get("overrides", [])
    recipe = load_recipe(run / "recipe.yaml", [*overrides, f"name={run.name}"]).recipe
    if rows is None:
        lines = (run / "data/eval.jsonl").read_text("utf-8").splitlines()
        return [Encoded.from_dict(json.loads(line)) for line in lines], recipe.evaluation
    keys = recipe.data
    shape = Shape(keys.format, keys.text_column, keys.label_column, keys.bins, keys.prompt, keys.system)
    examples, _ = to_examples(read_rows(rows, columns=keys.columns), shape)
    return encode_all(examples, bundle.tokenizer, max_length=recipe.training.max_length)[0], recipe.evaluation


@click.command("check")
@_on_bundle
def check_command(bundle_name: str | None, runs: Path, as_json: bool) -> None:
    """Compare every file with its hash and every golden case with what this machine computes."""
    bundle = _open(bundle_name, runs)
    problems = bundle.problems()
    if problems:
        raise StageError(problems)
    agreement = check_cases(bundle.runner(), from_manifest(bundle.manifest), stop_ids=bundle.tokenizer.stop_ids)
    if as_json:
        print_json({"bundle": str(bundle.folder), "agrees": agreement.agrees, **asdict(agreement)})
    else:
        print_table(
            str(bundle.folder),
            [
                ("files", f"{len(bundle.manifest['files'])}, {mb(size_bytes(bundle.folder))}, all as they were made"),
                (
                    "golden cases",
                    f"same first choice at {agreement.agreement:.1%} of {agreement.positions} positions; "
                    f"{agreement.free_cases - agreement.free_differences} of {agreement.free_cases} texts equal",
                ),
            ],
        )
    if not agreement.agrees:
        raise StageError(
            f"this runtime does not agree with the golden cases: {agreement.clear_differences} clear choices differ",
            hint="another onnxruntime version or processor may compute differently; see `qft doctor`",
        )
