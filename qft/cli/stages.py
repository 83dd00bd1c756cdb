"""qft run, and each stage alone on a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from qft import pipeline
from qft.cli.options import on_job, open_job
from qft.console import Screen, print_json, print_line, print_summary
from qft.errors import InputError, StageError
from qft.stages.report import summarize


def _work(
    arguments: Sequence[str],
    runs: Path,
    as_json: bool,
    wanted: Sequence[str],
    *,
    required: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    screen = Screen(quiet=as_json)
    with (
        screen.shown(),
        open_job([*arguments, *overrides], runs=runs, required=required, on_progress=screen.on_progress) as job,
    ):
        try:
            pipeline.run(job, wanted, on_stage=screen.on_stage)
        except StageError:
            screen.bars.stop()
            if not as_json:
                print_summary(summarize(job))  # a limit that was not kept: the figures show where quality was lost
            raise
        screen.bars.stop()
        if as_json:
            print_json(summarize(job).as_dict())
        else:
            print_summary(summarize(job))


def _stage_command(wanted: Sequence[str], text: str) -> Callable[[Any], click.Command]:
    """A command that does some stages, and those they stand on unless they are done."""
    name = wanted[0]

    @click.command(name, help=text)
    @on_job(required=False)
    def command(arguments: tuple[str, ...], runs: Path, as_json: bool) -> None:
        _work(arguments, runs, as_json, wanted)

    return command


@click.command("run")
@on_job(required=True)
def run_command(arguments: tuple[str, ...], runs: Path, as_json: bool) -> None:
    """Do everything a RECIPE asks for and end in a measured bundle and a report.

    What is done already is skipped; an interrupted run goes on where it stopped. KEY=VALUE overrides a key of the recipe, as
    training.epochs=2.
    """
    _work(arguments, runs, as_json, pipeline.STAGES, required=True)


@click.command("export")
@click.option(
    "--app", type=click.Choice(["python", "node", "web", "cpp", "java"]), help="Copy a bundle and this app into OUT."
)
@click.option("--onnx", is_flag=True, help="To ONNX (the only form there is).")
@click.option("--float", "as_float", is_flag=True, help="Stop at the plain float ONNX bundle.")
@on_job(required=False)
def export_command(
    app: str | None, onnx: bool, as_float: bool, arguments: tuple[str, ...], runs: Path, as_json: bool
) -> None:
    """Make the verified bundle of a RUN (default: the newest) or a RECIPE: merge, fold, export, quantize, verify.

    With --app, [RUN|BUNDLE] OUT: copy a small program with a bundle that is made already into the new folder OUT.
    """
    if app is None:
        _work(arguments, runs, as_json, ["export"] if as_float else ["verify"])
    else:
        _write_app(app, arguments, runs, as_json)


def _write_app(name: str, arguments: tuple[str, ...], runs: Path, as_json: bool) -> None:
    from qft.bundle.apps import APPS, write_app
    from qft.cli.bundles import open_bundle

    if len(arguments) not in (1, 2):
        raise InputError("which folder is to be made?", hint=f"as in `qft export --app {name} OUT`")
    bundle, out = open_bundle(arguments[0] if len(arguments) == 2 else None, runs), Path(arguments[-1])
    write_app(name, bundle, out)
    steps = [f"cd {out}", *APPS[name].steps]
    if as_json:
        print_json({"app": str(out), "bundle": str(bundle.folder), "steps": steps})
    else:
        print_line(f"{out} holds the {name} app with {bundle.folder}; next:")
        for step in steps:
            print_line(f"  {step}")


@click.command("bench")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "directml", "coreml", "openvino"]),
    help="onnxruntime's execution provider; never a silent fall back to the CPU.",
)
@on_job(required=False)
def bench_command(provider: str | None, arguments: tuple[str, ...], runs: Path, as_json: bool) -> None:
    """Measure load time, time to first token, prefill and decode of every bundle of a RUN (default: the newest)."""
    _work(arguments, runs, as_json, ["bench"], overrides=[f"bench.provider={provider}"] if provider else [])


tune_command = _stage_command(
    ["tune", "baseline"], "Train an adapter on the 4-bit base, and measure base and tuned model."
)
merge_command = _stage_command(
    ["merge"], "Merge the adapter into the base: both ways are measured, the 16-bit one must be clearly better."
)
fold_command = _stage_command(
    ["fold"],
    "Bring the merged model onto each target's 4-bit grid: fitted rounding, then learning from the tuned model.",
)
quantize_command = _stage_command(["quantize"], "Put every target's grid into the float graph.")
verify_command = _stage_command(
    ["verify"], "Hold torch, float ONNX and every target against each other and the budget."
)
report_command = _stage_command(["report"], "Write report.html from what there is.")
