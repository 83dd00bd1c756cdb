"""What a fine-tune keeps on its way into 4 bits: the usual way against folding, on the file that ships.

    python -m benchmarks.quantization --quick --json FILE     # 5 rows, one set, one seed: 25 minutes on 2 cores; --more: all rows
    python -m benchmarks.quantization --json FILE             # more steps and tokens, 3 seeds; cells are cached

Every cell runs in a process of its own and is kept under its fingerprint, so a broken or a longer run goes on where it was.
Shipped rows are computed by onnxruntime at accuracy_level 4, embedding and head in 8 bits. Gaps are of perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cells import CELLS, Setting, fold_words
from qft.files import sha256_json, write_json
from qft.measure.machine import machine, versions
from qft.sources import cache_folder

QUICK = Setting(set="tinyshakespeare", seed=0, length=128, steps=300, learning_rates=(1e-3,), test_rows=112,
                fold_tokens=16384, fold_steps=28)  # fmt: skip
FULL = Setting(set="tinyshakespeare", seed=0, length=256, steps=300, learning_rates=(5e-4, 1e-3, 2e-3), test_rows=200,
               fold_tokens=32768, fold_steps=48)  # fmt: skip
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
    """How much worse, in percent of perplexity, with the 95 % interval of a bootstrap over rows, paired."""

    percent: float
    low: float
    high: float


def interval(statistic: Callable[[Sequence[int]], float], count: int, draws: int = 2000) -> tuple[float, float]:
    """95 % of a statistic of row numbers, by bootstrap over `count` rows."""
    chance = random.Random(0)
    found = sorted(statistic(chance.choices(range(count), k=count)) for _ in range(draws))
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


def gap(reference: list[float], other: list[float], tokens: list[int], *, draws: int = 2000) -> Gap:
    """reference, other: summed loss of each test row, nats; tokens: its targets."""
    count = len(tokens)

    def percent(rows: Sequence[int]) -> float:
        difference = sum(other[i] - reference[i] for i in rows) / sum(tokens[i] for i in rows)
        return 100 * (math.exp(difference) - 1)

    return Gap(percent(range(count)), *interval(percent, count, draws))


def cell(name: str, setting: Setting) -> dict[str, Any]:
    """A cell's record, from the cache or from a fresh process."""
    tuned = replace(setting, fold_tokens=0, fold_steps=0)  # tuned models outlive a change of folding
    folder = (
        cache_folder() / "benchmarks/quantization" / sha256_json([asdict(tuned), versions(), asdict(machine())])[:16]
    )
    path = folder / f"{name}.json"
    words = fold_words(setting)
    if path.exists() and json.loads(path.read_text("utf-8")).get("fold", words) != words:
        path.unlink()
    if not path.exists():
        sys.stderr.write(f"{name} …\n")
        line = [sys.executable, "-m", "benchmarks.cells", name, str(folder), json.dumps(asdict(setting))]
        subprocess.run(line, check=True)
    return json.loads(path.read_text("utf-8"))


def result(settings: list[Setting], titles: dict[str, str]) -> dict[str, Any]:
    """Rows of the table, one for every title, setting and seed, and the figures promised (means over seeds)."""
    table: list[dict[str, Any]] = []
    for setting in settings:
        found = {name: cell(name, setting) for name in CELLS if name == "base" or name in titles.values()}
        for title, name in titles.items():
            reference = found["lora-nf4" if name.endswith("nf4") else "lora-none"]
            kept = asdict(gap(reference["row_nats"], found[name]["row_nats"], found[name]["row_tokens"]))
            ratio = found[name]["total_seconds"] / found["lora-nf4"]["train_seconds"]
            table.append(
                {
                    "row": title,
                    "seed": setting.seed,
                    "set": setting.set,
                    "gap": kept,
                    "time_ratio": ratio,
                    **found[name],
                }
            )
        base = found["base"]
        table.append({"row": "untouched base, float", "seed": setting.seed, "set": setting.set, **base})

    def mean(title: str, *keys: str) -> float:
        values = []
        for row in table:
            if row["row"] == title:
                value: Any = row
                for key in keys:
                    value = value[key]
                values.append(value)
        return sum(values) / len(values)

    folded, folded_nf4, usual = "16-bit LoRA, folded", "NF4 QLoRA, folded", "NF4 QLoRA, merged, rounded to nearest"
    return {
        "gap_percent": mean(folded, "gap", "percent"),
        "gap_percent_nf4": mean(folded_nf4, "gap", "percent"),
        "usual_gap_percent": mean(usual, "gap", "percent"),
        "bits_per_weight_linear": mean(folded_nf4, "bits_per_weight_linear"),
        "bits_per_weight_all": mean(folded_nf4, "bits_per_weight_all"),
        "time_ratio": max(mean(folded, "time_ratio"), mean(folded_nf4, "time_ratio")),
        "rows": table,
    }


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| row | perplexity | gap (95 %) | bits a weight: linear, all | time | peak memory | decode tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gap_text = "{percent:+.1f} % ({low:+.1f} … {high:+.1f})".format(**row["gap"]) if row.get("gap") else ""
        bits = (
            "{bits_per_weight_linear:.3f}, {bits_per_weight_all:.3f}".format(**row)
            if "bits_per_weight_all" in row
            else ""
        )
        speed = f"{row['decode_tokens_per_second']:.0f}" if "decode_tokens_per_second" in row else ""
        time = f"{row['time_ratio']:.2f}x" if "time_ratio" in row else ""
        memory = f"{row['peak_memory_bytes'] / 1e9:.1f} GB" if "peak_memory_bytes" in row else ""
        lines.append(f"| {row['row']} | {row['perplexity']:.2f} | {gap_text} | {bits} | {time} | {memory} | {speed} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The gaps with their intervals, a bar a row."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.get("gap") and row["gap"]["low"] != row["gap"]["high"]][::-1]
    figure = Figure(figsize=(9, 0.6 + 0.4 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    values = [row["gap"]["percent"] for row in shown]
    reach = [[v - row["gap"]["low"] for v, row in zip(values, shown, strict=True)],
             [row["gap"]["high"] - v for v, row in zip(values, shown, strict=True)]]  # fmt: skip
    colours = ["#2f7d6d" if "folded" in row["row"] else "#9aa5b1" for row in shown]
    seeds = len({row["seed"] for row in shown})
    labels = [row["row"] if seeds == 1 else f"{row['row']} (seed {row['seed']})" for row in shown]
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
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps and tokens")
    parser.add_argument("--more", action="store_true", help="with --quick: all rows of the full run, 15 minutes more")
    parser.add_argument("--seeds", type=int, default=3, help="of the full run")
    parser.add_argument("--json", type=Path, required=True, help="where every row's raw figures go")
    words = parser.parse_args()
    settings = [QUICK] if words.quick else [Setting(**{**asdict(FULL), "seed": seed}) for seed in range(words.seeds)]
    found = result(settings, ROWS if words.quick and not words.more else ROWS | MORE)
    rows = found.pop("rows")
    content = {"settings": [asdict(s) for s in settings], "machine": asdict(machine()), "versions": versions()}
    write_json(words.json, {**content, "result": found, "rows": rows})
    draw(rows, words.json.with_suffix(".png"))
    print(as_markdown(rows))
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
