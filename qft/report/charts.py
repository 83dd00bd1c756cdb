"""Pictures as SVG text, to stand inside the page: no file, no network, sharp at any size."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qft.measure.speed import Speed
from qft.report.summary import WaterfallStep

INK, MUTED, LINE = "#1f2933", "#7b8794", "#e4e7eb"
BASE, GOOD, SHIPPED, ACCENT = "#9aa5b1", "#2f7d6d", "#174a40", "#d1495b"


def waterfall_chart(steps: Sequence[WaterfallStep]) -> str:
    """Headline metric after each stage; the shipped bar stands out."""
    figure, axes = _figure(6.4, 2.6)
    names = [f"{s.stage}\n{s.target}" if s.target else s.stage for s in steps]
    values = [s.quality.value for s in steps]
    colours = [BASE if s.stage == "base" else SHIPPED if s.stage == "shipped" else GOOD for s in steps]
    bars = axes.bar(range(len(steps)), values, width=0.62, color=colours)
    percent = steps[0].quality.metric != "perplexity"
    axes.bar_label(bars, [f"{v:.1f} %" if percent else f"{v:.2f}" for v in values], padding=3, color=INK, fontsize=10)
    axes.set_xticks(range(len(steps)), names)
    axes.set_ylim(0, max(100.0, *values) * 1.12 if percent else max(values) * 1.18)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    return _svg(figure)


def curve_chart(curve: Sequence[tuple[int, float, float | None]]) -> str:
    """Training loss a step, its running mean, and the validation loss."""
    figure, axes = _figure(5.2, 3.6)
    steps, losses = [c[0] for c in curve], [c[1] for c in curve]
    axes.plot(steps, losses, color=LINE, linewidth=1, label="training, each step")
    axes.plot(steps, _smooth(losses), color=BASE, linewidth=2, label="training, running mean")
    held_out = [(step, loss) for step, _, loss in curve if loss is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=ACCENT, marker="o", markersize=5, linewidth=2, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a target token")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return _svg(figure)


def speed_chart(speeds: Mapping[str, Speed]) -> str:
    """Decode speed of each bundle beside what the machine's memory would allow."""
    figure, axes = _figure(6.4, 0.7 + 0.55 * len(speeds))
    names = list(speeds)[::-1]
    medians = [speeds[n].decode_tokens_per_second.median for n in names]
    limits = [speeds[n].memory_bandwidth_bytes_per_second / speeds[n].model_bytes for n in names]
    axes.barh(names, limits, height=0.6, color=LINE, label="limit set by memory bandwidth")
    bars = axes.barh(names, medians, height=0.6, color=GOOD, label="measured")
    axes.bar_label(bars, [f"{v:.0f} tokens/s" for v in medians], padding=4, color=INK, fontsize=10)
    axes.set_xlim(0, max([*limits, *medians]) * 1.08)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    return _svg(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential running mean, without a bias to its first value."""
    mean = weight = 0.0
    result = []
    for value in values:
        mean, weight = 0.9 * mean + 0.1 * value, 0.9 * weight + 0.1
        result.append(mean / weight)
    return result


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=INK, length=0, labelsize=10)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "qft"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)
