"""Pictures as SVG text, to stand inside the page: no file, no network, sharp at any size, in the page's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from qft.measure.quality import in_percent
from qft.measure.speed import Speed
from qft.report.summary import LabelResults, WaterfallStep, metric_name, value_text

INK, MUTED, LINE = "#1f2933", "#616e7c", "#e4e7eb"
BASE, GOOD, SHIPPED, ACCENT = "#9aa5b1", "#2f7d6d", "#174a40", "#d1495b"
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    BASE: "base",
    GOOD: "good",
    SHIPPED: "shipped",
    ACCENT: "accent",
}
_MOST_LABELS = 24  # in one picture
_MOST_STANDING = 7  # bars beside each other: the stages of one target


def waterfall_chart(steps: Sequence[WaterfallStep]) -> str:
    """Headline metric after each stage; what ships stands out. Of several targets bars lie: their names would run into each other."""
    lying, places = len(steps) > _MOST_STANDING, range(len(steps))
    figure, axes = _figure(6.4, 0.4 + 0.3 * len(steps)) if lying else _figure(6.4, 2.6)
    values, metric = [s.quality.value for s in steps], steps[0].quality.metric
    colours = [BASE if s.stage == "base" else SHIPPED if s.stage == "shipped" else GOOD for s in steps]
    limit = max(100.0, *values) * 1.12 if in_percent(metric) else max(values) * 1.18
    if lying:
        bars = axes.barh(places, values, height=0.62, color=colours)
        axes.set(xlim=(0, limit), xticks=[], ylim=(len(steps) - 0.5, -0.5))
        axes.set_yticks(places, [s.name for s in steps])
    else:
        bars = axes.bar(places, values, width=0.62, color=colours)
        axes.set(ylim=(0, limit), yticks=[])
        axes.set_xticks(places, [f"{s.stage}\n{s.target}" if s.target else s.stage for s in steps])
    axes.bar_label(bars, [value_text(metric, value) for value in values], padding=3, color=INK, fontsize=10)
    axes.spines["bottom" if lying else "left"].set_visible(False)
    shown = ", ".join(f"{step.name} {value_text(metric, step.quality.value)}" for step in steps)
    return _svg(figure, f"{metric_name(metric)} after each stage: {shown}")


def curve_chart(curve: Sequence[tuple[int, float, float | None]]) -> str:
    """Training loss a step, its running mean, and the validation loss."""
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(5.2, 3.6)
    steps, losses = [c[0] for c in curve], [c[1] for c in curve]
    axes.plot(steps, losses, color=LINE, linewidth=1, label="training, each step")
    axes.plot(steps, _smooth(losses), color=BASE, linewidth=2, label="training, running mean")
    held_out = [(step, loss) for step, _, loss in curve if loss is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=ACCENT, marker="o", markersize=5, linewidth=2, label="validation")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("loss, nats a target")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # decades alone may leave a short curve without a number
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    told = f"loss of a training step from {losses[0]:.3f} to {losses[-1]:.3f} in {len(steps)} steps"
    looks = ", ".join(f"{loss:.3f} at step {step}" for step, loss in held_out)
    return _svg(figure, f"{told}; validation loss {looks}" if looks else told)


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
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
    shown = ", ".join(
        f"{name} {speed:.0f} of at most {most:.0f}" for name, speed, most in zip(names, medians, limits, strict=True)
    )
    return _svg(figure, f"tokens a second beside the limit set by memory bandwidth: {shown}")


def confusion_chart(found: LabelResults) -> str:
    """What was said (across) of rows that have a label (down): the labels that are confused most, each row's share."""
    from matplotlib.patches import Rectangle

    often: dict[str, int] = {}
    for expected, said, rows in found.confused:
        often[expected] = often.get(expected, 0) + rows
        often[said] = often.get(said, 0) + rows
    chosen = sorted(sorted(often, key=lambda name: -often[name])[:_MOST_LABELS])
    place = {name: number for number, name in enumerate(chosen)}
    score = {one.label: one for one in found.scores}
    shares = [[0.0] * len(chosen) for _ in chosen]
    for name, number in place.items():
        shares[number][number] = score[name].recall_percent if name in score else 0.0
    for expected, said, rows in found.confused:
        if expected in place and said in place:
            shares[place[expected]][place[said]] = 100 * rows / score[expected].rows
    # As wide as other pictures: the page stretches them all to one width, and the letters of a small one with it.
    figure, axes = _figure(max(6.4, 2.2 + 0.28 * len(chosen)), 1.6 + 0.26 * len(chosen))
    axes.set_aspect("equal", anchor="W")
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            axes.add_patch(
                Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, color=GOOD, alpha=0.05 + share / 180, linewidth=0)
            )
            if share >= 1:
                axes.text(column + 0.5, row + 0.5, f"{share:.0f}", ha="center", va="center", fontsize=7, color=INK)
    axes.set_xlim(0, len(chosen))
    axes.set_ylim(len(chosen), 0)
    middles = [number + 0.5 for number in range(len(chosen))]
    axes.set_xticks(middles, chosen, rotation=90, fontsize=8)
    axes.set_yticks(middles, chosen, fontsize=8)
    axes.set_xlabel("answered")
    axes.set_ylabel("expected")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    often_so = ", ".join(f"{expected} answered as {said} in {rows}" for expected, said, rows in found.confused[:5])
    return _svg(figure, f"which labels are confused; most rows: {often_so}")


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


def _svg(figure: Any, told: str) -> str:
    """told: the picture in words, for those who do not see it."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "qft"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    attributes = f'role="img" aria-label={quoteattr(told)}'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: attributes, svg, count=1)
