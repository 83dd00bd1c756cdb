"""Does a recogniser that learns spoken digits forget sentences, and does a replay mix keep them? Words wrong of each, before and after.

    python -m benchmarks.forgetting --json FILE            # 200 digits of one speaker, half of 37 sentences held out
    python -m benchmarks.forgetting --quick --json FILE    # few digits: shows that it works

Both runs are benchmarks/recipes/digits-and-sentences.yaml, once with `data.weights` that leave the sentences out. Held out are a
speaker of digits and every second sentence by hash; most sentences have one reader, so that half of them is learnt by another half
of his. The 95 % interval is of the shipped file's figure (bootstrap over clips).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quantization import interval
from benchmarks.tasks import MORE, run
from qft.files import write_json, write_text
from qft.measure.machine import machine, versions
from qft.measure.transcripts import error_percents

DATA = Path(__file__).resolve().parents[2] / "shared/data"
_SPEAKER = "theo"
_LONGEST = 10.0  # seconds, the recipe's window
_QUICK_DIGITS = 10  # one clip in so many
_QUICK = {"training.epochs": 1, "fold.steps": 4, "fold.tokens": 200, "export.targets": "[cpu-int4]"}
WAYS = {"digits alone": {"data.weights": "[1,0]"}, "with sentences": {}}


@dataclass(frozen=True)
class Sets:
    """Files of rows; held_out has `digits` rows of digits, then the sentences."""

    digits_file: Path
    sentences_file: Path
    held_out: Path
    digits: int


def _rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name / "meta.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path.resolve()


def sets(folder: Path, *, quick: bool) -> Sets:
    """Write the files. What is held out also stands among what is given for training, where qft leaves it out."""
    digits = _rows("fsdd")[:: _QUICK_DIGITS if quick else 1]
    given = [row for row in _rows("speech_sentences") if row["language"] == "en" and row["seconds"] <= _LONGEST]
    sentences = sorted(given, key=lambda row: hashlib.sha256(row["audio"].encode()).hexdigest())
    spoken = [row for row in digits if row["speaker"] == _SPEAKER]
    return Sets(
        _write(folder / "digits.jsonl", digits),
        _write(folder / "sentences.jsonl", sentences),
        _write(folder / "held-out.jsonl", [*spoken, *sentences[::2]]),
        len(spoken),
    )


def wrong(answers: Sequence[dict[str, Any]]) -> float:
    """Percent of words."""
    return error_percents([a["expected"] for a in answers], [a["answer"] for a in answers])[0]


def lines(way: str, found: dict[str, Any], tuned: Sequence[dict[str, Any]], digits: int) -> list[dict[str, Any]]:
    """The table's lines for one way: digits, then sentences."""
    stages = {"before": found["before"], "tuned": tuned, "shipped": found["shipped"]}
    table = []
    for name, of_digits in (("digits", True), ("sentences", False)):
        part = {
            stage: [a for a in answers if (int(a["where"].rpartition(":")[2]) <= digits) == of_digits]
            for stage, answers in stages.items()
        }
        shipped = part["shipped"]
        low, high = interval(lambda rows, shipped=shipped: wrong([shipped[i] for i in rows]), len(shipped), draws=400)
        figures = {stage: wrong(answers) for stage, answers in part.items()}
        table.append({"way": way, "set": name, "clips": len(shipped), **figures, "low": low, "high": high})
    return table


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the digits, one epoch")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, required=True, help="where every row's answer goes")
    words = parser.parse_args()
    suffix = "-quick" if words.quick else ""
    files = sets(words.runs / f"forgetting-rows{suffix}", quick=words.quick)
    given = {"data.train": f"[{files.digits_file},{files.sentences_file}]", "data.eval": files.held_out}
    table, found = [], {}
    for way, changes in WAYS.items():
        name = f"forgetting-{way.replace(' ', '-')}{suffix}"
        quick = _QUICK if words.quick else {}
        found[way] = run(MORE / "digits-and-sentences.yaml", words.runs, {**given, **quick, **changes}, name=name)
        tuned = [json.loads(line) for line in (words.runs / name / "answers/tune.jsonl").open(encoding="utf-8")]
        table += lines(way, found[way], tuned, files.digits)
    about = {"quick": words.quick, "machine": asdict(machine()), "versions": versions()}
    write_json(words.json, {**about, "result": {"sets": table}, "rows": found})
    print("| learnt | heard | clips | words wrong before | tuned | shipped (95 %) |")
    print("|---|---|---|---|---|---|")
    for r in table:
        print(
            f"| {r['way']} | {r['set']} | {r['clips']} | {r['before']:.1f} % | {r['tuned']:.1f} % | "
            f"{r['shipped']:.1f} % ({r['low']:.1f} … {r['high']:.1f}) |"
        )
    print("RESULT " + json.dumps({"sets": table}))


if __name__ == "__main__":
    main()
