"""Do changed training rows help where rows are few? One job with and without them, three seeds each.

    python -m benchmarks.augmentation --json FILE                  # review-labels, MiniLM, 300 rows to learn
    python -m benchmarks.augmentation --job digits --json FILE     # Whisper, 60 clips to learn
    python -m benchmarks.augmentation --quick --json FILE          # one seed, fewer rows: shows that it works

Both ways take about as many steps: where two changed copies stand beside every row, a third of the epochs are made. Figures are of the
shipped bundle. The gain is in points of held-out rows that are right, a mean over seeds, with its 95 % interval (bootstrap over rows,
paired; the seeds are taken as they are).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quantization import interval
from benchmarks.tasks import MORE, RECIPES, run
from qft.files import write_json
from qft.measure.machine import machine, versions

_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Experiment:
    """recipe: its file. few: keys that leave few rows. ways: name → keys; quick: keys for a quick look."""

    recipe: Path
    few: Mapping[str, object]
    ways: Mapping[str, Mapping[str, object]]
    quick: Mapping[str, object] = field(default_factory=dict)


_MASKS = {f"data.augment.spec_augment.{kind}_masks": 2 for kind in ("frequency", "time")}
JOBS = {
    "review-labels": Experiment(
        RECIPES / "review-labels.yaml",
        {"data.max_train_rows": 300, "data.eval": 1000, "export.budget.max_worse": "9 points"},
        {
            "as they are": {"training.epochs": 6},
            "changed copies": {"training.epochs": 2, "data.augment.copies": 2},
        },
        {"data.max_train_rows": 64, "data.eval": 100, "data.validation": 50, "fold.tokens": 2048},
    ),
    "digits": Experiment(
        MORE / "digits.yaml",
        {"data.max_train_rows": 60, "training.epochs": 10, "export.targets": "[cpu-int4]"},
        {
            "as they are": {},
            "noise, speed": {"data.augment.noise": "[5,30]", "data.augment.speed": "[0.9,1,1.1]"},
            "noise, speed, masks": {"data.augment.noise": "[5,30]", "data.augment.speed": "[0.9,1,1.1]", **_MASKS},
        },
        {"data.max_train_rows": 16, "training.epochs": 2, "fold.steps": 2, "fold.tokens": 100},
    ),
}


def gained(plain: Sequence[Sequence[dict[str, Any]]], changed: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """Points of rows that are right, more with changed rows than without. Both: a list of the rows' answers for each seed."""
    count = len(plain[0])
    more = [fmean(b[i]["right"] - a[i]["right"] for a, b in zip(plain, changed, strict=True)) for i in range(count)]

    def points(rows: Sequence[int]) -> float:
        return 100 * fmean(more[i] for i in rows)

    low, high = interval(points, count, draws=1000)
    return {"value": points(range(count)), "low": low, "high": high}


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer rows")
    parser.add_argument("--job", choices=list(JOBS), default="review-labels", help="what is learnt")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, required=True, help="where every row's answer goes")
    words = parser.parse_args()
    job, seeds = JOBS[words.job], _SEEDS[:1] if words.quick else _SEEDS
    found: dict[str, list[dict[str, Any]]] = {}
    for way, changes in job.ways.items():
        keys = {**job.few, **changes, **(job.quick if words.quick else {})}
        name = f"augment-{words.job}-{way.replace(',', '').replace(' ', '-')}{'-quick' if words.quick else ''}"
        found[way] = [
            run(job.recipe, words.runs, {**keys, "training.seed": seed}, name=f"{name}-{seed}") for seed in seeds
        ]
    plain, table = next(iter(found.values())), []
    for way, runs in found.items():
        steps = [{step["stage"]: step for step in each["summary"]["waterfall"]} for each in runs]
        table.append(
            {
                "way": way,
                "metric": steps[0]["shipped"]["metric"],
                "tuned": [step["tuned"]["value"] for step in steps],
                "shipped": [step["shipped"]["value"] for step in steps],
                "right": [step["shipped"]["accuracy_percent"] for step in steps],
                "rows_to_learn": runs[0]["summary"]["data"]["train_rows"],
                "gain": gained([r["shipped"] for r in plain], [r["shipped"] for r in runs])
                if runs is not plain
                else None,
            }
        )
    about = {"job": words.job, "quick": words.quick, "machine": asdict(machine()), "versions": versions()}
    write_json(words.json, {**about, "result": {"ways": table}, "rows": found})
    print(f"| rows of {words.job} | to learn | {table[0]['metric']} shipped, by seed | rows right | gain (95 %) |")
    print("|---|---|---|---|---|")
    for each in table:
        by_seed = ", ".join(f"{value:.1f}" for value in each["shipped"])
        gain = "{value:+.1f} ({low:+.1f} … {high:+.1f})".format(**each["gain"]) if each["gain"] else ""
        print(f"| {each['way']} | {each['rows_to_learn']} | {by_seed} | {fmean(each['right']):.1f} % | {gain} |")
    print("RESULT " + json.dumps({"ways": table}))


if __name__ == "__main__":
    main()
