"""Speed and memory of tuning beside TRL and a plain PEFT loop: the same model, rows, batch and steps, trials alternating.

    python -m benchmarks.training --quick --peers .venv-peers/bin/python --json FILE     # 2 trials of 8 steps: 5 minutes on 2 cores
    python -m benchmarks.training --peers .venv-peers/bin/python --json FILE             # 5 trials of 16 steps

Each trial is a process of its own. Tokens/s are of the median step, the first two left out; memory is the process's peak. `make peers`
makes the environment that has TRL.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cells import MODEL
from benchmarks.peers import trial
from benchmarks.peers.training import DATA, WAYS, Work
from qft.base_model import local_checkpoint
from qft.files import write_json
from qft.measure.machine import machine, versions
from qft.sources import cache_folder, fetch

_UNCOUNTED = 2  # first steps: caches fill


def line(way: str, work: Work, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """A way's line of the table, out of its trials."""
    speeds = [work.batch * work.length / statistics.median(t["seconds"][_UNCOUNTED:]) for t in trials]
    return {
        "way": way,
        "tokens_per_second": statistics.median(speeds),
        "slowest_trial": min(speeds),
        "fastest_trial": max(speeds),
        "peak_memory_bytes": max(t["peak_memory_bytes"] for t in trials),
        "held_out_loss": statistics.median(t["held_out_loss"] for t in trials),
    }


def result(table: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of one setting of ours, the one without checkpointing, to the better of TRL's: speed and memory each."""
    ours, peers = table["qft"], [table["TRL"], table["TRL, checkpointing"]]
    loss = peers[0]["held_out_loss"]
    return {
        "speed_vs_trl": ours["tokens_per_second"] / max(p["tokens_per_second"] for p in peers),
        "memory_vs_trl": ours["peak_memory_bytes"] / min(p["peak_memory_bytes"] for p in peers),
        "checkpointing_speed_vs_trl": table["qft, checkpointing"]["tokens_per_second"]
        / max(p["tokens_per_second"] for p in peers),
        "checkpointing_memory_vs_trl": table["qft, checkpointing"]["peak_memory_bytes"]
        / min(p["peak_memory_bytes"] for p in peers),
        "loss_difference": ours["held_out_loss"] / loss - 1,
    }


def as_markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table for people."""
    lines = ["| trainer | tokens/s (trials) | peak memory | held-out loss |", "|---|---|---|---|"]
    lines += [
        f"| {r['way']} | {r['tokens_per_second']:.0f} ({r['slowest_trial']:.0f}-{r['fastest_trial']:.0f}) | "
        f"{r['peak_memory_bytes'] / 1e9:.2f} GB | {r['held_out_loss']:.4f} |"
        for r in table.values()
    ]
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two trials of 8 steps instead of five of 16")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has TRL")
    parser.add_argument("--json", type=Path, required=True, help="where every trial goes")
    words = parser.parse_args()
    if not DATA.exists():
        raise SystemExit(f"{DATA} is not there: this benchmark reads it")
    source = fetch(MODEL, relative_to=Path(), cache=cache_folder(), repo_type="model")
    work = Work(str(local_checkpoint(source, cache=cache_folder())), steps=8 if words.quick else 16)
    trials = [
        trial("training", way, asdict(work), words.peers if way.startswith("TRL") else sys.executable)
        for _ in range(2 if words.quick else 5)
        for way in WAYS
    ]
    table = {way: line(way, work, [t for t in trials if t["way"] == way]) for way in WAYS}
    found = {"quick": words.quick, "work": asdict(work), "machine": asdict(machine()), "versions": versions()}
    write_json(words.json, found | {"trials": trials, "result": result(table) | {"table": list(table.values())}})
    print(as_markdown(table))
    print("RESULT " + json.dumps(result(table)))


if __name__ == "__main__":
    main()
