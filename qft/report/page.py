"""report.html, and what `qft compare` writes: each one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, select_autoescape

from qft.bundle.apps import APPS
from qft.bundle.card import python_lines
from qft.licences import asks
from qft.measure.energy import EUROS_A_KWH, WATTS_A_CORE, euros, watt_hours
from qft.measure.occlusion import Carried
from qft.measure.speed import Speed, mb
from qft.report.charts import confusion_chart, curve_chart, speed_chart, waterfall_chart
from qft.report.comparison import Comparison, about, tables
from qft.report.summary import Summary, metric_name, percent, value_text
from qft.report.words import Knobs, advice, sentence

_LONGEST = 600  # characters of a row that are shown


def render(summary: Summary, knobs: Knobs, carried: Sequence[Carried]) -> str:
    """The page as text. Everything from rows and recipes is escaped; only our own pictures stand in it as markup.

    carried: which words carried the surest errors among labels.
    """
    decoders = {name: speed for name, speed in summary.speeds.items() if isinstance(speed, Speed)}
    charts = {
        "waterfall": waterfall_chart(summary.waterfall) if summary.waterfall else "",
        "curve": curve_chart(summary.training.curve) if summary.training and summary.training.curve else "",
        "speed": speed_chart(decoders) if decoders else "",
        "confusion": confusion_chart(summary.labels) if summary.labels and summary.labels.confused else "",
    }
    bundle = f"{summary.run_folder}/bundles/{summary.headline_target}"
    peak = max(summary.stage_memory_bytes.values(), default=0)
    return _rendered(
        "page.html.j2",
        s=summary,
        charts=charts,
        peak=peak,
        sentence=sentence(summary),
        advice=advice(summary, knobs),
        carried=carried,
        python="\n".join(python_lines(summary.task, bundle, has_labels=summary.labels is not None)),
        apps=sorted((name for name, app in APPS.items() if summary.task in app.tasks), key=lambda name: name != "web"),
        watts_a_core=WATTS_A_CORE,
        euros_a_kwh=EUROS_A_KWH,
    )


def render_comparison(found: Comparison) -> str:
    """The page of `qft compare --html`."""
    return _rendered(
        "compare.html.j2", runs=found.runs, same_rows=found.same_rows, about=about(found), tables=tables(found)
    )


def _rendered(name: str, **values: Any) -> str:
    environment = Environment(
        autoescape=select_autoescape(default=True), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "mb": mb,
        "percent": percent,
        "number": _number,
        "watt_hours": watt_hours,
        "euros": euros,
        "asks": asks,
        "cut": _cut,
        "metric_name": metric_name,
    }
    environment.globals["value_text"] = value_text
    pages = files("qft.report")
    style = pages.joinpath("page.css").read_text("utf-8")
    return environment.from_string(pages.joinpath(name).read_text("utf-8")).render(style=style, **values)


def _cut(text: str) -> str:
    """A long text's beginning."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _number(value: float) -> str:
    return f"{value:,.0f}"
