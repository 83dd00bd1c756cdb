"""What commands that open a bundle share: how it is named, and how an answer is chosen."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from qft.bundle.manifest import Bundle
from qft.bundle.sampling import SAMPLING_NAMES, Sampling
from qft.cli.options import find_run, made_job, on_runs, shared
from qft.errors import InputError

_SAMPLING: list[tuple[str, type, str]] = [
    ("temperature", float, "How much chance there is in an answer. Default: 0, none; 1 if the choice is narrowed."),
    ("top_k", int, "Choose among so many of the likeliest tokens."),
    ("top_p", float, "Choose among the likeliest tokens that together have this share."),
    ("min_p", float, "Choose among tokens at least this share as likely as the likeliest."),
    ("repetition_penalty", float, "Above 1: what was said before becomes less likely."),
    ("seed", int, "The same seed makes the same choices."),
]


def by_option(function: Any) -> Any:
    """--bundle alone: the words of `qft predict` are texts."""
    function = click.option(
        "--bundle",
        "bundle_name",
        metavar="BUNDLE|RUN",
        help="A bundle's folder or a run; default: the newest run's first target.",
    )(function)
    return on_runs(shared(function))


def on_bundle(function: Any) -> Any:
    """BUNDLE as a word, or as --bundle."""

    @functools.wraps(function)
    def command(word: str | None, bundle_name: str | None, **options: Any) -> Any:
        if word is not None and bundle_name is not None:
            raise InputError(f"one bundle at a time, not {word} and {bundle_name}", where="--bundle")
        return function(bundle_name=bundle_name if word is None else word, **options)

    return click.argument("word", required=False, metavar="[BUNDLE|RUN]")(by_option(command))


def sampled(function: Any) -> Any:
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
