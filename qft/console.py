"""The only place that prints: progress on stderr, results on stdout, or one JSON object there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from qft.errors import InputError
from qft.measure.energy import watt_hours
from qft.measure.speed import AnySpeed, mb
from qft.pipeline import StageEvent
from qft.progress import Progress
from qft.report.summary import Summary, TargetSize, metric_name, percent, value_text

out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on stdout; letters that it may not have are written as JSON can write any."""
    plain = "utf" not in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    sys.stdout.write(json.dumps(value, ensure_ascii=plain) + "\n")


class Screen:
    """Bars while a stage works, one line when it is done.

    In a pipe, a log or a notebook there are no bars but a line every half minute, without colours.
    """

    def __init__(self, *, quiet: bool, line_seconds: float = 30) -> None:
        self.quiet, self.line_seconds = quiet, line_seconds
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            TextColumn("{task.fields[note]}"),
            console=err,
            transient=True,
            disable=quiet or not err.is_terminal,
        )
        self.task: Any = None
        self.began = self.said = 0.0
        self.what = ""
        self.process = psutil.Process()

    @contextmanager
    def shown(self) -> Iterator[Screen]:
        """Draw while the block runs."""
        with self.bars:
            yield self

    def on_progress(self, report: Progress) -> None:
        """Move the bar; a new `what` starts a new one."""
        if self.task is None or report.what != self.what:
            self._clear()
            self.task = self.bars.add_task(report.what, total=report.total, note="", rate="", memory="")
            self.what, self.began = report.what, time.monotonic()
            self.said = self.began
        seconds, memory = time.monotonic() - self.began, mb(self.process.memory_info().rss)
        rate = f"{report.done / seconds:.1f} {report.unit}/s" if report.unit and report.done and seconds > 0 else ""
        self.bars.update(
            self.task, completed=report.done, total=report.total, note=report.note, rate=rate, memory=memory
        )
        if not self.quiet and self.bars.disable and time.monotonic() - self.said >= self.line_seconds:
            self.said = time.monotonic()
            err.print(_progress_line(report, seconds, memory), markup=False, soft_wrap=True)

    def on_stage(self, event: StageEvent) -> None:
        """One line a stage."""
        self._clear()
        if self.quiet or event.state == "begin":
            return
        mark, style = {"done": ("✓", "green"), "skipped": ("·", "dim"), "failed": ("✗", "red")}[event.state]
        took = "done before" if event.state == "skipped" else f"{event.seconds:6.1f} s" if event.state == "done" else ""
        err.print(
            Text.assemble(
                (f" {mark} ", style), (f"{event.stage:<9}", "bold"), (f" {took:>11}", "dim"), f"  {headline(event)}"
            ),
            soft_wrap=True,
        )

    def _clear(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None


def _progress_line(report: Progress, seconds: float, memory: str) -> str:
    """`train: 40 of 120 steps, loss 0.412  310 tokens/s, 1.91 GB, 2:10 min left`."""
    done = f"{report.done:,.0f}" + (f" of {report.total:,.0f}" if report.total else "") + f" {report.unit}"
    left = ""
    if report.total and report.done:
        minutes, rest = divmod(round(seconds * (report.total - report.done) / report.done), 60)
        left = f"{minutes}:{rest:02} min left"
    return f"   {report.what}: " + ", ".join(filter(None, [done.rstrip(), report.note, memory, left]))


def headline(event: StageEvent) -> str:
    """The one thing to know about a finished stage."""
    facts = event.facts or {}
    if not facts or event.state == "failed":
        return ""
    if event.stage == "prepare":
        data = facts["report"]
        return (
            f"{data['train_rows']:,} rows to learn, {data['validation_rows']:,} to choose, {data['eval_rows']:,} to test; "
            f"{data['train_tokens']:,} tokens"
        )
    if event.stage == "fold":
        return "  ".join(
            f"{name}: {_quality(t['rounded'])} rounded, {_quality(t['quality'])} folded"
            for name, t in facts["targets"].items()
        )
    if event.stage == "quantize":
        return "  ".join(
            f"{name}: {_quality(t['quality'])}, {mb(t['bundle_bytes'])}" for name, t in facts["targets"].items()
        )
    if event.stage == "verify":
        return "  ".join(f"{name}: same first choice {p['top1']:.1%}" for name, p in facts["targets"].items())
    if event.stage == "bench":
        return "  ".join(
            f"{name}: {speed.headline}"
            for name, speed in TypeAdapter(dict[str, AnySpeed]).validate_python(facts["targets"]).items()
        )
    if event.stage == "report":
        return str(facts["path"])
    more = {
        "tune": lambda: f", {facts['tokens_per_second']:.0f} tokens/s",
        "merge": lambda: f", into the {facts['way']}",
        "export": lambda: "".join(
            f"; {name}'s provider has no kernel for {', '.join(lacking)}"
            for name, lacking in facts["without_kernel"].items()
        ),
    }
    return _quality(facts["quality"]) + more.get(event.stage, lambda: "")()


def _quality(quality: dict[str, Any]) -> str:
    return f"{metric_name(quality['metric'])} {value_text(quality['metric'], quality['value'])}"


def print_summary(summary: Summary) -> None:
    """The waterfall, what ships, where to look, and what to type next."""
    if summary.waterfall:
        out.print(_waterfall_table(summary))
    if summary.speeds:
        out.print(speed_table(summary.speeds, summary.sizes))
    for name, size in summary.sizes.items():
        if size.on_cpu:
            left = ", ".join(f"{count} {operator}" for operator, count in size.on_cpu.items())
            out.print(f"{name}: left to the processor were {left}", soft_wrap=True)
        if size.threads_tried:
            rates = ", ".join(f"{threads}: {rate:,.1f}" for threads, rate in size.threads_tried.items())
            out.print(f"{name}: threads tried, with speed: {rates}; the fastest was taken", soft_wrap=True)
    if summary.survived_percent is not None:
        out.print(f"{percent(summary.survived_percent)} of what tuning took off the loss has survived in what ships")
    peak = max(summary.stage_memory_bytes.values(), default=0)
    out.print(f"{summary.seconds:.0f} s in all, peak memory {mb(peak)}, {watt_hours(summary.energy)}")
    bundle = (
        f"{summary.run_folder}/bundles/{summary.headline_target}" if summary.headline_target in summary.sizes else ""
    )
    if bundle:
        print_line(f"bundle   {bundle}")
    if (report := Path(summary.run_folder, "report.html")).exists():
        print_line(f"report   {report}")
    if bundle:
        print_line(f"next     qft predict --bundle {bundle}   or: qft export --app web {bundle} page")


def _waterfall_table(summary: Summary) -> Table:
    first = summary.waterfall[0]
    table = _table(f"{summary.name}: {first.quality.rows} held-out rows after every stage", ["stage", *first.cells()])
    for step in summary.waterfall:
        table.add_row(step.name, *step.cells().values(), style="bold" if step.stage == "shipped" else "")
    return table


def speed_table(speeds: Mapping[str, AnySpeed], sizes: Mapping[str, TargetSize]) -> Table:
    """Every bundle's size and speed, with their spread."""
    one = next(iter(speeds.values()))
    table = _table(one.about, ["bundle", "size", *one.cells()])
    for name, speed in speeds.items():
        size = sizes[name].bundle_bytes if name in sizes else speed.model_bytes
        table.add_row(name, mb(size), *speed.cells().values())
    return table


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="dim", box=None, header_style="bold", pad_edge=False,
                  padding=(0, 2, 0, 0))  # fmt: skip
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
    return table


def print_marked(rows: Sequence[tuple[str, Sequence[tuple[str, bool]]]]) -> None:
    """Rows with the text in the loss marked."""
    for where, runs in rows:
        out.print(Text(where, style="dim"))
        out.print(
            Text.assemble(*((text, "bold black on green" if flag else "") for text, flag in runs)), soft_wrap=True
        )
        out.print()


def print_columns(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table under a title of any length, with a line of names."""
    out.print(Text(title, style="dim"))
    table = _table("", names)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_line(text: str) -> None:
    """One line on stdout."""
    out.print(text, markup=False, soft_wrap=True)


def print_tick(good: bool, text: str) -> None:
    """One line on stdout with a mark before it."""
    mark, style = ("✓", "green") if good else ("✗", "red")
    out.print(Text.assemble((f" {mark} ", style), text), soft_wrap=True)


def print_problems(messages: Iterable[str]) -> None:
    """What went wrong, on stderr."""
    for message in messages:
        err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def print_piece(text: str) -> None:
    """Part of a line on stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_served(url: str, card: Mapping[str, Any], *, as_json: bool) -> None:
    """Where a server is, at once: whoever started it waits for this line."""
    if as_json:
        print_piece(json.dumps({"url": url, **card}, ensure_ascii=False) + "\n")
        return
    rows = [
        ("page", f"{url}/"),
        ("ask", ", ".join(f"POST {path}" for path in card["endpoints"])),
        ("see", "/health, /metrics, /v1/models"),
        ("end", "Ctrl-C"),
    ]
    print_table(f"{card['id']} ({card['task']}, {card['target']})", rows)
    sys.stdout.flush()


def given_lines() -> Iterator[str]:
    """The lines of stdin, without empty ones. Raises InputError if they are not UTF-8."""
    try:
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
    except UnicodeDecodeError as error:
        hint = "save it as UTF-8 (iconv -f latin1 -t utf-8), or set PYTHONIOENCODING=latin1"
        raise InputError(f"not UTF-8: {error.reason}", where="stdin", hint=hint) from None


def typed_lines(mark: str) -> Iterator[str]:
    """Lines as they are typed after a mark, or those of a file on stdin, without empty ones. Ctrl-C and Ctrl-D end them."""
    if not sys.stdin.isatty():
        yield from given_lines()
        return
    while True:
        try:
            line = input(mark)
        except (EOFError, KeyboardInterrupt):
            print_line("")
            return
        if line.strip():
            yield line
