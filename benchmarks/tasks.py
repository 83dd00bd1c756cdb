"""The shipped recipes, each by the command in its first line: quality before, after and in the file that ships.

    python -m benchmarks.tasks --quick --json FILE                  # few rows: at most 25 minutes on 2 cores
    python -m benchmarks.tasks --json FILE                          # as they stand
    python -m benchmarks.tasks --only sarcasm,review-labels --json FILE

Also by name: the recipes in benchmarks/recipes, on rows that qft does not ship (../shared/data). Runs are kept in --runs, so a broken
benchmark goes on where it was; so is what FILE holds of recipes that are not run now. `baseline` is the metric if the commonest
held-out label were every answer. `gain` is how much better the file that ships is than the model before tuning, in the metric's own
unit, with its 95 % interval (bootstrap over held-out rows, paired). A recipe of several targets is told by its first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from qft.bundle.classifier import Labels
from qft.files import write_text
from qft.measure.machine import machine, versions
from qft.measure.quality import RowAnswer
from qft.measure.scores import Score, difference, score_of

RECIPES, MORE = Path(__file__).parent.parent / "recipes", Path(__file__).parent / "recipes"
_FEW = {"data.max_train_rows": 128, "data.eval": 64, "data.validation": 32, "training.epochs": 1, "fold.tokens": 2048,
        "bench.trials": 2, "training.evaluations": 1, "evaluation.answers": 16}  # fmt: skip
_SMALLER_IS_BETTER = {"perplexity", "loss", "wer", "cer"}
_NOT_KEPT = ("where", "ended", "probability")
_USUAL = {field.name: field.default for field in fields(RowAnswer)}


def run(path: Path, runs: Path, changes: Mapping[str, object], *, name: str) -> dict[str, Any]:
    """What `qft run RECIPE key=value …` came to, with the rows' answers before tuning and as shipped; a failed `verify` too."""
    words = [f"{key}={value}" for key, value in changes.items()]
    sys.stderr.write(f"qft run recipes/{path.name} {' '.join(words)}\n")
    _qft("run", str(path), f"name={name}", *words, "--runs", str(runs), stdout=sys.stderr)
    found = json.loads(_qft("report", str(runs / name), "--json", stdout=subprocess.PIPE))
    shipped = f"quantize-{Path(found['bundle']).name}"
    before, after = (_answers(runs / name / "answers" / f"{stage}.jsonl") for stage in ("baseline", shipped))
    return {"summary": found, "before": before, "shipped": after}


def _qft(*words: str, stdout: Any) -> str:
    done = subprocess.run([sys.executable, "-m", "qft", *words], stdout=stdout, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: a limit of the recipe that was not kept, which the table says
        raise SystemExit(f"qft {' '.join(words)} ended with {done.returncode}")
    return done.stdout


def _few(path: Path) -> dict[str, int]:
    """The keys that make a recipe quick: not the number of test rows where these are a source of their own, nor that of training
    rows where a new model's tokenizer is learnt from them.
    """
    given = yaml.safe_load(path.read_text("utf-8"))
    kept = {"data.eval"} if isinstance(given["data"].get("eval"), str) else set()
    kept |= {"data.max_train_rows"} if given["model"].endswith(".json") else set()
    return {key: value for key, value in _FEW.items() if key not in kept}


def _answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _kept(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the figures are of, and no more: thousands of rows lie in the repository."""
    return [
        {key: value for key, value in answer.items() if key not in _NOT_KEPT and value != _USUAL[key]}
        | {"loss": round(answer["loss"], 5)}
        for answer in answers
    ]


@dataclass(frozen=True)
class Result:
    """What FILE holds. table: a line a recipe; rows: answers before and after, machine and versions."""

    quick: bool
    table: dict[str, dict[str, Any]]
    rows: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: Path, *, quick: bool) -> Result:
        """What is there already, if it is of the same number of rows."""
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if found.get("quick") is not quick:
            return cls(quick, {}, {})
        return cls(quick, {line["recipe"]: line for line in found["result"]["recipes"]}, found["rows"])

    def add(self, name: str, found: dict[str, Any]) -> None:
        """A recipe that was run just now."""
        self.table[name] = row(name, found)
        about = {"machine": asdict(machine()), "versions": versions()}
        self.rows[name] = about | {key: _kept(found[key]) for key in ("before", "shipped")}

    def write(self, path: Path) -> None:
        """All of it, in the order of names."""
        recipes = [self.table[name] for name in sorted(self.table)]
        found = {"quick": self.quick, "result": {"recipes": recipes}, "rows": self.rows}
        write_text(path, json.dumps(found, ensure_ascii=False) + "\n")


def row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A recipe's line of the table."""
    summary = found["summary"]
    target = Path(summary["bundle"]).name
    steps = {step["stage"]: step for step in summary["waterfall"] if step.get("target") in (None, target)}
    metric = steps["shipped"]["metric"]
    labels = summary["labels"]["scores"] if summary["labels"] else []
    names = tuple(score["label"] for score in labels)
    return {
        "recipe": name,
        "metric": metric,
        "baseline": None if summary["majority_percent"] is None else baseline(metric, found["before"], names),
        "before": steps["base"]["value"],
        "tuned": steps["tuned"]["value"],
        "exported": steps["exported"]["value"],
        "shipped": steps["shipped"]["value"],
        "target": target,
        "targets": {step["target"]: step["value"] for step in summary["waterfall"] if step["stage"] == "shipped"},
        "gain": gain(metric, found["before"], found["shipped"], names),
        "minutes": summary["seconds"] / 60,
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "joules": summary["energy"]["joules"],
        "bundle_bytes": summary["bundle_bytes"],
        "problems": summary["problems"],
    }


def baseline(metric: str, answers: Sequence[dict[str, Any]], labels: Sequence[str] = ()) -> float:
    """The metric if the commonest expected answer were given to every row. labels: those that macro F1 is of."""
    ((commonest, _),) = Counter(answer["expected"] for answer in answers).most_common(1)
    given = [{**answer, "answer": commonest, "right": answer["expected"] == commonest} for answer in answers]
    return _score(metric, given, labels).of()


def gain(
    metric: str, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], labels: Sequence[str] = ()
) -> dict[str, float]:
    """How much better `after` is, in the metric's unit; of perplexity and of errors how much less."""
    apart = difference(_score(metric, before, labels), _score(metric, after, labels))
    low, high = sorted([apart.low, apart.high])
    if metric in _SMALLER_IS_BETTER:
        return {"value": -apart.value, "low": -high, "high": -low}
    return {"value": apart.value, "low": low, "high": high}


def _score(metric: str, answers: Sequence[dict[str, Any]], labels: Sequence[str]) -> Score:
    rows = [RowAnswer(**{"where": "", "ended": True, **answer}) for answer in answers]
    score = score_of(metric, rows, Labels(tuple(labels), several=True))
    assert score is not None, metric
    return score


def as_markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| recipe | metric | commonest answer | before | tuned | shipped | gain (95 %) | minutes | memory | bundle |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in table:
        baseline = "" if r["baseline"] is None else f"{r['baseline']:.1f}"
        gained = "{value:+.1f} ({low:+.1f} … {high:+.1f})".format(**r["gain"])
        lines.append(
            f"| {r['recipe']} | {r['metric']} | {baseline} | {r['before']:.1f} | {r['tuned']:.1f} | {r['shipped']:.1f} | {gained} | "
            f"{r['minutes']:.1f} | {r['peak_memory_bytes'] / 1e9:.1f} GB | {r['bundle_bytes'] / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows of each: shows that all paths work")
    parser.add_argument("--only", default="", help="names of recipes, with commas between; default: all")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, required=True, help="where every row's answer goes")
    words = parser.parse_args()
    only = words.only.split(",") if words.only else [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    result = Result.load(words.json, quick=words.quick)
    for stem in only:
        path = next(p for p in (RECIPES / f"{stem}.yaml", MORE / f"{stem}.yaml") if p.exists())
        few = _few(path) if words.quick else {}
        result.add(stem, run(path, words.runs, few, name=f"{stem}-quick" if words.quick else stem))
        result.write(words.json)
    table = [result.table[name] for name in sorted(result.table)]
    print(as_markdown(table))
    print("RESULT " + json.dumps({"recipes": table}))


if __name__ == "__main__":
    main()
