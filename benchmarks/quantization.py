"""What a fine-tune keeps on its way into 4 bits: the usual way against folding, on the file that ships.

    python -m benchmarks.quantization --quick --json FILE     # one set, one seed, fewer tokens; --more: more rows
    python -m benchmarks.quantization --json FILE             # three sets, three seeds: hours; what FILE holds is not made again
    python -m benchmarks.quantization --sets clinc_oos --seeds 0 --json FILE     # a part of it
    python -m benchmarks.quantization --sets "tinyshakespeare, moved base" --seeds 0 --json FILE     # weights never rounded

Every cell runs in a process of its own and is kept under its fingerprint, so a broken or a longer run goes on where it was.
Shipped rows are computed by onnxruntime at accuracy_level 4, embedding and head in 8 bits. Gaps are of perplexity; where intents are
named, also of those named right, in points.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cells import CELLS, fold_words
from benchmarks.rounding_rows import INTENTS, MOVED, TEXTS, Setting
from qft.files import sha256_json, write_json
from qft.measure.machine import machine, versions
from qft.sources import cache_folder

QUICK = Setting(set=TEXTS[0], seed=0, length=128, batch_size=1, steps=300, learning_rates=(1e-3,), test_rows=112,
                fold_tokens=16384, fold_steps=28, fold_batch_size=4)  # fmt: skip
# Three seeds' test rows are others each: 52,000 tokens of a text, 2,400 sentences with 53,000 tokens.
FULL = Setting(set="", seed=0, length=256, batch_size=2, steps=300, learning_rates=(5e-4, 1e-3, 2e-3), test_rows=68,
               fold_tokens=16384, fold_steps=48, fold_batch_size=2)  # fmt: skip
FULL_INTENTS = replace(FULL, set=INTENTS, batch_size=16, test_rows=800, fold_batch_size=24)
SETS = {name: replace(FULL, set=name) for name in TEXTS} | {INTENTS: FULL_INTENTS}
# At the learning rate that every set chose of the three.
ALL = SETS | {MOVED: replace(FULL, set=MOVED, learning_rates=(2e-3,))}
ROWS = {
    "16-bit LoRA": "lora-none",
    "NF4 QLoRA, before its merge": "lora-nf4",
    "NF4 QLoRA, merged, rounded to nearest": "nearest-nf4",
    "16-bit LoRA, folded": "fold-none",
    "NF4 QLoRA, folded": "fold-nf4",
}
MORE = {
    "NF4 QLoRA, merged, evened out, rounded to nearest": "nearest-evened-nf4",
    "16-bit LoRA, fitted rounding without learning": "fit-none",
    "16-bit LoRA, folded, embedding and head in 4 bits": "small-head-none",
    "16-bit LoRA, onnxruntime's MatMulNBitsQuantizer": "ort-default",
    "16-bit LoRA, its k_quant": "ort-k_quant",
    "16-bit LoRA, its HQQ": "ort-hqq",
}


@dataclass(frozen=True)
class Gap:
    """How much worse, in percent of perplexity, or how much better, in points; low and high: 95 %, a paired bootstrap over rows."""

    value: float
    low: float
    high: float


def interval(statistic: Callable[[Sequence[int]], float], count: int, draws: int = 2000) -> tuple[float, float]:
    """95 % of a statistic of row numbers, by bootstrap over `count` rows."""
    chance = random.Random(0)
    found = sorted(statistic(chance.choices(range(count), k=count)) for _ in range(draws))
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


def gap(reference: list[float], other: list[float], tokens: list[int]) -> Gap:
    """reference, other: summed loss of each test row, nats; tokens: its targets."""
    count = len(tokens)

    def percent(rows: Sequence[int]) -> float:
        difference = sum(other[i] - reference[i] for i in rows) / sum(tokens[i] for i in rows)
        return 100 * (math.exp(difference) - 1)

    return Gap(percent(range(count)), *interval(percent, count))


def points(reference: list[bool], other: list[bool]) -> Gap:
    """More rows right, in points."""
    more = [100 * (ours - theirs) for theirs, ours in zip(reference, other, strict=True)]
    return Gap(fmean(more), *interval(lambda rows: fmean(more[i] for i in rows), len(more)))


def cell(name: str, setting: Setting) -> dict[str, Any]:
    """A cell's record, from the cache or from a fresh process."""
    tuned = replace(setting, fold_tokens=0, fold_steps=0, fold_batch_size=0)  # tuned models outlive a change of folding
    folder = (
        cache_folder() / "benchmarks/quantization" / sha256_json([asdict(tuned), versions(), asdict(machine())])[:16]
    )
    path = folder / f"{name}.json"
    if path.exists() and not is_of_this_folding(json.loads(path.read_text("utf-8")), setting):
        path.unlink()
    if not path.exists():
        sys.stderr.write(f"{setting.set} {setting.seed} {name} …\n")
        line = [sys.executable, "-m", "benchmarks.cells", name, str(folder), json.dumps(asdict(setting))]
        subprocess.run(line, check=True)
    return json.loads(path.read_text("utf-8"))


def is_of_this_folding(record: dict[str, Any], setting: Setting) -> bool:
    """Whether a record needs no folding, or was folded as it now is."""
    words = fold_words(setting)
    return bool(record.get("fold", words) == words)


def is_current(record: dict[str, Any], setting: Setting) -> bool:
    """Whether a record is of this setting, but for its seed and learning rates, and of the folding there now is."""
    of = record["setting"]
    wanted = {**asdict(setting), "seed": record["seed"], "learning_rates": of["learning_rates"]}
    return bool(of == wanted) and is_of_this_folding(record, setting)


def records(setting: Setting, names: Sequence[str], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a set and seed: those that are known, if none is missing, else made now."""
    if {record["cell"] for record in known} >= set(names):
        return known
    made = {name: cell(name, setting) for name in CELLS if name in names}
    about = {"set": setting.set, "seed": setting.seed, "setting": asdict(setting)}
    others = [record for record in known if record["cell"] not in made]
    return others + [{"cell": name, **about, **record} for name, record in made.items()]


def table(records: list[dict[str, Any]], titles: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A line for every set and title, over all of the set's seeds."""
    for name in dict.fromkeys(record["set"] for record in records):
        seeds: dict[str, dict[int, dict[str, Any]]] = {}
        for record in records:
            if record["set"] == name:
                seeds.setdefault(record["cell"], {})[record["seed"]] = record
        for title, of in {"untouched base, float": "base", **titles}.items():
            if of in seeds:
                reference = seeds["lora-nf4" if of.endswith("nf4") else "lora-none"]
                yield {"set": name, "row": title, **_line(seeds[of], reference, seeds["lora-nf4"])}


def _line(
    ours: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]], nf4: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """By seed. reference: the fine-tune that a gap is to; nf4: what time is measured in."""

    def all_of(records: dict[int, dict[str, Any]], key: str) -> list[Any]:
        return [value for seed in sorted(ours) for value in records[seed][key]]

    nats, tokens = all_of(ours, "row_nats"), all_of(ours, "row_tokens")
    timed = [seed for seed in ours if not ours[seed].get("busy")]
    line: dict[str, Any] = {"seeds": sorted(ours), "perplexity": math.exp(sum(nats) / sum(tokens))}
    some = ours[min(ours)]
    if "row_right" in some:
        line["right_percent"] = 100 * fmean(all_of(ours, "row_right"))
    if "total_seconds" in some:
        line["gap"] = asdict(gap(all_of(reference, "row_nats"), nats, tokens))
        if timed:
            line["time_ratio"] = fmean(ours[seed]["total_seconds"] / nf4[seed]["train_seconds"] for seed in timed)
        if "row_right" in some:
            line["points"] = asdict(points(all_of(reference, "row_right"), all_of(ours, "row_right")))
    if timed and "decode_tokens_per_second" in some:
        line["decode_tokens_per_second"] = fmean(ours[seed]["decode_tokens_per_second"] for seed in timed)
    shown = ("bits_per_weight_linear", "bits_per_weight_all", "peak_memory_bytes")
    return line | {key: fmean(record[key] for record in ours.values()) for key in shown if key in some}


def promised(lines: list[dict[str, Any]]) -> dict[str, float]:
    """What issue and README promise: gaps of texts and points of intents are means over the three sets, of time the largest.

    On the moved base the gaps stand for themselves.
    """

    def of(title: str, *keys: str, moved: bool = False) -> Iterator[float]:
        for line in lines:
            if (line["row"], line["set"] == MOVED) != (title, moved):
                continue
            if keys[0] in line and not (keys[0] == "gap" and "points" in line):
                value: Any = line
                for key in keys:
                    value = value[key]
                yield value

    sixteen, four = "16-bit LoRA, folded", "NF4 QLoRA, folded"
    ratios = [*of(sixteen, "time_ratio"), *of(four, "time_ratio")]
    found = {
        "gap_percent": [*of(sixteen, "gap", "value")],
        "gap_percent_nf4": [*of(four, "gap", "value")],
        "usual_gap_percent": [*of("NF4 QLoRA, merged, rounded to nearest", "gap", "value")],
        "points": [*of(sixteen, "points", "value")],
        "points_nf4": [*of(four, "points", "value")],
        "bits_per_weight_linear": [*of(four, "bits_per_weight_linear")],
        "bits_per_weight_all": [*of(four, "bits_per_weight_all")],
        "gap_percent_moved_base": [*of(sixteen, "gap", "value", moved=True)],
        "gap_percent_nf4_moved_base": [*of(four, "gap", "value", moved=True)],
        "time_ratio": [max(ratios)] if ratios else [],
    }
    return {name: fmean(values) for name, values in found.items() if values}


def as_markdown(lines: list[dict[str, Any]]) -> str:
    """The table for people."""
    found = [
        "| set | row | perplexity | gap (95 %) | right (95 %, points) | bits a weight: linear, all | time | decode tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        gap_text = "{value:+.1f} % ({low:+.1f} … {high:+.1f})".format(**line["gap"]) if "gap" in line else ""
        right = f"{line['right_percent']:.1f} %" if "right_percent" in line else ""
        right += " ({value:+.1f}: {low:+.1f} … {high:+.1f})".format(**line["points"]) if "points" in line else ""
        keys = "bits_per_weight_linear", "bits_per_weight_all"
        bits = ", ".join(f"{line[key]:.3f}" for key in keys) if keys[0] in line else ""
        time = f"{line['time_ratio']:.2f}x" if "time_ratio" in line else ""
        speed = f"{line['decode_tokens_per_second']:.0f}" if "decode_tokens_per_second" in line else ""
        cells = [line["set"], line["row"], f"{line['perplexity']:.2f}", gap_text, right, bits, time, speed]
        found.append("| " + " | ".join(cells) + " |")
    return "\n".join(found)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """The gaps with their intervals, a bar a row."""
    from matplotlib.figure import Figure

    shown = [line for line in lines if "gap" in line and line["gap"]["low"] != line["gap"]["high"]][::-1]
    figure = Figure(figsize=(9, 0.6 + 0.4 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    values = [line["gap"]["value"] for line in shown]
    reach = [[v - line["gap"]["low"] for v, line in zip(values, shown, strict=True)],
             [line["gap"]["high"] - v for v, line in zip(values, shown, strict=True)]]  # fmt: skip
    colours = ["#2f7d6d" if "folded" in line["row"] else "#9aa5b1" for line in shown]
    labels = [
        line["row"] if len({each["set"] for each in shown}) == 1 else f"{line['set']}: {line['row']}" for line in shown
    ]
    bars = axes.barh(labels, values, xerr=reach, color=colours, ecolor="#1f2933", capsize=3, height=0.6)
    axes.bar_label(bars, [f"{v:+.1f} %" for v in values], padding=14)
    axes.set_xlim(min(0.0, *values), max(values) * 1.4)
    axes.set_xlabel("perplexity above the same float fine-tune, %")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one set, one seed, fewer steps and tokens")
    parser.add_argument("--more", action="store_true", help="more rows of what is made now; 8 minutes more a seed")
    parser.add_argument("--sets", nargs="*", choices=ALL, default=list(SETS), help="of the full run, to be made now")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of the full run; 0 comes first")
    parser.add_argument(
        "--busy", action="store_true", help="other work runs beside it: its seconds are kept and not counted"
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="where every row's raw figures go, and where they are taken from"
    )
    words = parser.parse_args()
    sets = {QUICK.set: QUICK} if words.quick else ALL
    found = json.loads(words.json.read_text("utf-8"))["records"] if words.json.exists() else []
    known = [record for record in found if record["set"] in sets and is_current(record, sets[record["set"]])]
    for seed, name in product([0] if words.quick else words.seeds, sets if words.quick else words.sets):
        names = ["base", *ROWS.values(), *(MORE.values() if words.more else ())]
        ours = [record for record in known if (record["set"], record["seed"]) == (name, seed)]
        setting = _with_rate(replace(sets[name], seed=seed), known)
        made = [r if r in ours or not words.busy else r | {"busy": True} for r in records(setting, names, ours)]
        known = [record for record in known if record not in ours] + made
        known.sort(key=lambda r: (list(ALL).index(r["set"]), r["seed"], list(CELLS).index(r["cell"])))
        lines = [*table(known, ROWS | MORE)]
        write_json(words.json, {"result": promised(lines), "table": lines, "records": known})
    draw(lines, words.json.with_suffix(".png"))
    print(as_markdown(lines))
    print("RESULT " + json.dumps(promised(lines)))


def _with_rate(setting: Setting, known: list[dict[str, Any]]) -> Setting:
    """Later seeds take the learning rate that was best for the first."""
    first = [r for r in known if (r["set"], r["seed"], r["cell"]) == (setting.set, 0, "lora-none")]
    return replace(setting, learning_rates=(first[0]["learning_rate"],)) if setting.seed and first else setting


if __name__ == "__main__":
    main()
