"""qft compare: runs beside each other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from qft.cli.options import find_run, made_job, on_runs, shared
from qft.console import print_columns, print_json, print_line
from qft.errors import InputError
from qft.files import write_text
from qft.report.comparison import about, compare, tables


@click.command("compare")
@click.argument("names", nargs=-1, metavar="RUN RUN...")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write it as a page, too.")
@on_runs
@shared
def compare_command(names: tuple[str, ...], html: Path | None, runs: Path, as_json: bool) -> None:
    """Hold runs against the first RUN: where their recipes differ, and what that came to.

    Quality after every stage comes with the difference to the first run and its interval (paired bootstrap), if both were measured
    on the same held-out rows.
    """
    from qft.report.page import render_comparison
    from qft.stages.compare import compared

    if len(names) < 2:
        raise InputError("which runs?", hint="as in `qft compare quickstart bigger`; a run is a folder in runs/")
    found = compare([compared(made_job(find_run(name, runs))) for name in names])
    if html is not None:
        write_text(html, render_comparison(found))
    if as_json:
        print_json(asdict(found))
        return
    for title, rows in tables(found):
        if rows:
            print_columns(title, ["", *found.runs], rows)
            print_line("")
    print_line(about(found))
