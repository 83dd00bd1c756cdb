"""report.html: one file that needs no network."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined, select_autoescape

from qft.measure.energy import WATTS_A_CORE, watt_hours
from qft.measure.speed import Speed, mb
from qft.report.charts import confusion_chart, curve_chart, speed_chart, waterfall_chart
from qft.report.summary import Summary, metric_name, percent, value_text


def render(summary: Summary) -> str:
    """The page as text. Everything from rows and recipes is escaped; only our own pictures stand in it as markup."""
    environment = Environment(
        autoescape=select_autoescape(default=True), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "mb": mb,
        "percent": percent,
        "number": _number,
        "watt_hours": watt_hours,
        "metric_name": metric_name,
    }
    environment.globals["value_text"] = value_text
    template = environment.from_string(files("qft.report").joinpath("page.html.j2").read_text("utf-8"))
    decoders = {name: speed for name, speed in summary.speeds.items() if isinstance(speed, Speed)}
    charts = {
        "waterfall": waterfall_chart(summary.waterfall) if summary.waterfall else "",
        "curve": curve_chart(summary.training.curve) if summary.training and summary.training.curve else "",
        "speed": speed_chart(decoders) if decoders else "",
        "confusion": confusion_chart(summary.labels) if summary.labels and summary.labels.confused else "",
    }
    peak = max(summary.stage_memory_bytes.values(), default=0)
    return template.render(s=summary, charts=charts, peak=peak, watts_a_core=WATTS_A_CORE)


def _number(value: float) -> str:
    return f"{value:,.0f}"
