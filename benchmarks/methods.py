"""Ways of tuning on one job: QLoRA, LoRA, its variants, the head alone, every weight. Quality, time, memory, energy.

    python -m benchmarks.methods --json FILE                        # sarcasm, MiniLM: 20 minutes on 2 cores
    python -m benchmarks.methods --recipe quickstart --json FILE    # any other shipped recipe
    python -m benchmarks.methods --quick --json FILE                # a tenth of the rows

LoRA and its variants learn at the recipe's rate, every weight at a fifth of it, at most 1e-4.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tasks import RECIPES, row, run
from qft.files import write_json
from qft.measure.machine import machine, versions

_ROWS, _QUICK_ROWS = 3000, 300


def ways(rate: float) -> dict[str, dict[str, object]]:
    """Name → the keys that make it. rate: LoRA's learning rate."""
    float_base = {"quantization.base": "none"}
    return {
        "QLoRA": {},
        "LoRA": float_base,
        "rsLoRA": {**float_base, "lora.use_rslora": "true"},
        "DoRA": {**float_base, "lora.use_dora": "true"},
        "PiSSA": {**float_base, "lora.init_lora_weights": "pissa"},
        "every weight": {
            **float_base,
            "tuning.method": "full",
            "training.learning_rate": min(rate / 5, 1e-4),
        },
        "head alone": {"tuning.method": "head"},
    }


def line(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A way's line of the table."""
    summary = found["summary"]
    shown = row(name, found)
    kept = {key: shown[key] for key in ("metric", "before", "tuned", "shipped", "gain")}
    return {
        "way": name,
        **kept,
        "tune_minutes": summary["stage_seconds"]["tune"] / 60,
        "tune_peak_memory_bytes": summary["stage_peak_memory_bytes"]["tune"],
        "tune_joules": summary["stage_joules"]["tune"],
        "trainable_parameters": summary["trainable_parameters"],
    }


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_ROWS} rows instead of {_ROWS}")
    parser.add_argument("--recipe", default="sarcasm", help="name of a shipped recipe")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, required=True, help="where every row's answer goes")
    words = parser.parse_args()
    path = RECIPES / f"{words.recipe}.yaml"
    recipe = yaml.safe_load(path.read_text("utf-8"))
    generates = recipe["task"] == "text-generation"
    found = {}
    for name, changes in ways(float(recipe["training"]["learning_rate"])).items():
        if generates and name == "head alone":
            continue
        rows = {"data.max_train_rows": _QUICK_ROWS if words.quick else _ROWS}
        found[name] = run(path, words.runs, rows | changes, name=f"{words.recipe}-{name.replace(' ', '-')}")
    table = [line(name, each) for name, each in found.items()]
    about = {"recipe": words.recipe, "quick": words.quick, "machine": asdict(machine()), "versions": versions()}
    write_json(words.json, {**about, "result": {"ways": table}, "rows": found})
    print("| way | before | tuned | shipped | gain (95 %) | minutes of tuning | energy | memory | what learns |")
    print("|---|---|---|---|---|---|---|---|---|")
    for each in table:
        gained = "{value:+.1f} ({low:+.1f} … {high:+.1f})".format(**each["gain"])
        print(
            f"| {each['way']} | {each['before']:.1f} | {each['tuned']:.1f} | {each['shipped']:.1f} | {gained} | "
            f"{each['tune_minutes']:.1f} | {each['tune_joules'] / 3600:.2f} Wh | "
            f"{each['tune_peak_memory_bytes'] / 1e9:.1f} GB | {each['trainable_parameters']:,} |"
        )
    print("RESULT " + json.dumps({"ways": table}))


if __name__ == "__main__":
    main()
