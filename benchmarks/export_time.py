"""Seconds and memory from a checkpoint to a graph: qft beside optimum-cli and genai's builder, trials alternating, one process a trial.

    python -m benchmarks.export_time --quick --peers PYTHON --json FILE      # 1 round: 2 minutes on 2 cores
    python -m benchmarks.export_time --peers PYTHON --json FILE              # 5 rounds

SmolLM2-135M-Instruct, a bfloat16 checkpoint on the disk. Seconds are of the whole process, imports included; memory is what it held at
most, beside the bytes that the weights have in 16 bits. `make peers` makes the environment that has genai's builder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cells import MODEL
from benchmarks.peers import packages, trial
from benchmarks.peers.export import OURS, WAYS, Work
from qft.base_model import local_checkpoint
from qft.files import write_json
from qft.measure.machine import machine, versions
from qft.sources import cache_folder, fetch


def timed(way: str, base: Path, python: str) -> dict[str, Any]:
    """One trial."""
    with TemporaryDirectory(prefix="qft-export-time-") as scratch:
        began = time.perf_counter()
        found = trial("export", way, asdict(Work(str(base), f"{scratch}/made")), python)
        return found | {"seconds": time.perf_counter() - began}


def line(way: str, trials: list[dict[str, Any]], weights: int) -> dict[str, Any]:
    """A way's line of the table. weights: their bytes in 16 bits."""
    mine = [trial for trial in trials if trial["way"] == way]
    peak = max(trial["peak_memory_bytes"] for trial in mine)
    seconds = [trial["seconds"] for trial in mine]
    return {
        "way": way,
        "seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "peak_memory_bytes": peak,
        "times_weights": peak / weights,
        "written_bytes": mine[0]["written_bytes"],
    }


def result(table: list[dict[str, Any]]) -> dict[str, float]:
    """Ours, and how it stands to the fastest and the leanest peer."""
    (ours,) = (row for row in table if row["way"] == OURS)
    found = {"export_seconds": ours["seconds"], "export_times_weights": ours["times_weights"]}
    peers = [row for row in table if row["way"] != OURS]
    for name in ("seconds", "peak_memory_bytes") if peers else ():
        found[f"export_{name}_vs_best_peer"] = ours[name] / min(row[name] for row in peers)
    return found


def as_markdown(table: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = ["| way | seconds (fastest) | memory | of the 16-bit weights | written |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['way']} | {r['seconds']:.1f} ({r['least_seconds']:.1f}) | {r['peak_memory_bytes'] / 1e6:.0f} MB | "
        f"{r['times_weights']:.1f}x | {r['written_bytes'] / 1e6:.0f} MB |"
        for r in table
    ]
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--json", type=Path, required=True, help="where every trial goes")
    words = parser.parse_args()
    base = local_checkpoint(
        fetch(MODEL, relative_to=Path(), cache=cache_folder(), repo_type="model"), cache=cache_folder()
    )
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    there = packages(words.peers, *(needs for _, needs in WAYS.values()))
    ways = [way for way, (_, needs) in WAYS.items() if way == OURS or needs in there]
    about = {"quick": words.quick, "machine": asdict(machine()), "versions": versions(), "weights_bytes": weights}
    trials: list[dict[str, Any]] = []
    for _ in range(1 if words.quick else 5):
        for way in ways:
            trials.append(timed(way, base, sys.executable if way == OURS else words.peers))
            write_json(words.json, about | {"trials": trials})
    table = [line(way, trials, weights) for way in ways]
    write_json(words.json, about | {"trials": trials, "result": result(table) | {"table": table}})
    print(as_markdown(table))
    print("RESULT " + json.dumps(result(table)))


if __name__ == "__main__":
    main()
