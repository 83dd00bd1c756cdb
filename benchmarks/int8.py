"""Intents of banking77: the bundles that ship against onnxruntime's own dynamic int8 of the same float graph.

    python -m benchmarks.int8 --json FILE             # tunes MiniLM first: 6 minutes on 2 cores
    python -m benchmarks.int8 --quick --json FILE     # a fifth of the rows

A tenth of the rows is held out by hash. `quantize_dynamic` rounds weights to 8 bits for a whole matrix (or channel) and inputs for
a whole tensor; users report 5 to 15 points lost (onnxruntime#11286).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quantization import interval
from benchmarks.tasks import run
from qft.bundle.classifier import OnnxClassifier
from qft.bundle.manifest import Bundle
from qft.data.labelled import Labelled
from qft.files import write_json
from qft.measure.classification import measure_labels
from qft.measure.machine import machine, versions
from qft.measure.quality import Measuring, RowAnswer

RECIPE = Path(__file__).parent / "recipes/banking77.yaml"


def models(run: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Name → ONNX file: the float export, the run's bundles, and dynamic int8 made of the float one."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = Bundle.load(run / "bundles/float").models["model"]
    yield "float", plain
    for folder in sorted((run / "bundles").iterdir()):
        if folder.name != "float":
            yield folder.name, Bundle.load(folder).models["model"]
    for name, per_channel in (("quantize_dynamic", False), ("quantize_dynamic, per channel", True)):
        path = scratch / f"{per_channel}.onnx"
        quantize_dynamic(plain, path, weight_type=QuantType.QInt8, per_channel=per_channel)
        yield name, path


def answers(path: Path, bundle: Bundle, rows: list[Labelled]) -> list[RowAnswer]:
    """What a model says of every row."""
    runner = OnnxClassifier(path, pad_id=bundle.tokenizer.pad_id)
    return measure_labels(runner, rows, bundle.labels, Measuring("accuracy", 64, 1))[1]


def line(name: str, path: Path, found: list[RowAnswer], reference: list[RowAnswer]) -> dict[str, Any]:
    """A model's line of the table; points against float, paired."""
    gained = [100 * (ours.right - theirs.right) for ours, theirs in zip(found, reference, strict=True)]
    low, high = interval(lambda numbers: fmean(gained[i] for i in numbers), len(gained), draws=1000)
    return {
        "model": name,
        "right_percent": 100 * fmean(answer.right for answer in found),
        "loss": fmean(answer.loss for answer in found),
        "points": fmean(gained),
        "low": low,
        "high": high,
        "bytes": sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")),
    }


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the rows to learn")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run is kept")
    parser.add_argument("--json", type=Path, required=True, help="where every row's answer goes")
    words = parser.parse_args()
    name = "banking77-quick" if words.quick else "banking77"
    run(RECIPE, words.runs, {"data.max_train_rows": 1700} if words.quick else {}, name=name)
    folder = words.runs / name
    bundle = Bundle.load(folder / "bundles/float")
    lines = (folder / "data/eval.jsonl").read_text("utf-8").splitlines()
    rows = [Labelled.from_dict(json.loads(each)) for each in lines]
    with tempfile.TemporaryDirectory() as scratch:
        paths = dict(models(folder, Path(scratch)))
        found = {name: answers(path, bundle, rows) for name, path in paths.items()}
        table = [line(name, path, found[name], found["float"]) for name, path in paths.items()]
    kept = {name: [[a.where, a.answer, a.right, round(a.loss, 5)] for a in each] for name, each in found.items()}
    about = {"recipe": RECIPE.read_text("utf-8"), "machine": asdict(machine()), "versions": versions()}
    write_json(words.json, {**about, "result": {"models": table}, "rows": kept})
    print("| model | right | against float, points (95 %) | loss | size |\n|---|---|---|---|---|")
    for each in table:
        points = "{points:+.1f} ({low:+.1f} … {high:+.1f})".format(**each)
        print(
            f"| {each['model']} | {each['right_percent']:.1f} % | {points} | {each['loss']:.4f} | {each['bytes'] / 1e6:.1f} MB |"
        )
    print("RESULT " + json.dumps({"models": table}))


if __name__ == "__main__":
    main()
