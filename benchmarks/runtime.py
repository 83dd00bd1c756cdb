"""Speed of the shipped decoder beside other ways to run one: the same prompts, trials alternating, one process a trial.

    python -m benchmarks.runtime --quick --peers .venv-peers/bin/python --json FILE      # at most 20 minutes on 2 cores
    python -m benchmarks.runtime --peers .venv-peers/bin/python --json FILE              # 7 rounds: hours

SmolLM2-135M-Instruct as it is, rounded to the nearest point of a grid: fused and not; as genai's builder makes it; as the package's own
GGUF (Q4_1); and, by torch, not rounded at all. Blocks are of 32 everywhere. Prompts of 16, 256 and 2,048 tokens, one row and eight, 128
new tokens each; 2,048 tokens at once are read less often, 8 times as many in the full run alone. Speeds are medians over all trials, on
the wall and by processor time, which says more on a machine that others use as well. What is done is kept if the run is broken.
`make peers` makes the environment that has the peers; without it the others run. What RESULT says of encoders and Whisper is taken from
the newest figures of `benchmarks.encoders` and `benchmarks.speech`, which are run by themselves.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
import subprocess
import sys
import time
from bisect import bisect
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.cells import MODEL
from benchmarks.peers import packages, trial
from benchmarks.peers.runtime import WAYS, Cell, Work
from benchmarks.rounding_rows import DATA
from qft.base_model import local_checkpoint
from qft.bundle.assets import Decoder, copy_tokenizer, write_decoder_configs
from qft.bundle.session import KEPT_LOGITS, READS, open_session, physical_cores, reads_tokens
from qft.data.tokenizer import TextTokenizer
from qft.files import folder_aside, write_json
from qft.graph.export_optimum import export_float
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.measure.machine import machine, memory_bandwidth, versions
from qft.quant.grids import Scheme, grids_of
from qft.sources import cache_folder, fetch
from qft.targets import FUSIONS, find_target

OURS, RAW = "qft", "raw session, genai's graph"
PROMPTS, NEW_TOKENS = (16, 256, 2048), 128
_SHOWN_CELL = (256, 1)
_REPEATS, _ROUNDS, _QUICK_ROUNDS = 2, 7, 3
_QUICK_SECONDS = 17 * 60  # of 20 minutes: models are made before, operators are timed after
_TEXTS, _ROW = 8, 256  # tokens
_BLOCK = 32  # as genai's builder and Q4_1 have it
_PROFILED, _PROFILED_PREFILLS = 32, 3  # runs
_SHOWN = 0.02  # milliseconds


def prepare(folder: Path, python: str | None) -> None:
    """The models, in a new folder. python: an interpreter that has the builder of genai's graphs."""
    source = fetch(MODEL, relative_to=Path(), cache=cache_folder(), repo_type="model")
    base = local_checkpoint(source, cache=cache_folder())
    positions = json.loads((base / "config.json").read_text("utf-8"))["max_position_embeddings"]
    target = find_target("cpu-int4")
    grids = replace(grids_of(target), linear=Scheme(4, _BLOCK))
    with folder_aside(folder) as aside:
        (aside / "float").mkdir()
        export_float(base, aside / "float", graphs=["model"], export_task="text-generation-with-past")
        for name in ("fused", "plain"):
            bundle, file = aside / name, "onnx/model_q4.onnx"
            (bundle / "onnx").mkdir(parents=True)
            plan = GraphPlan(grids, target.accuracy_level, fuse=FUSIONS if name == "fused" else (), positions=positions)
            quantize_graph(aside / "float/model.onnx", bundle / file, plan, {})
            _describe(base, bundle, file)
        shutil.rmtree(aside / "float")
        shutil.copyfile(source.path, aside / "model.gguf")
        shutil.copytree(base, aside / "base")
        if python:
            _builder_graph(base, aside / "genai", python)
        tokenizer = TextTokenizer.load(base)
        text = gzip.decompress((DATA / "tinyshakespeare/input.txt.gz").read_bytes()).decode()
        ids = tokenizer.encode(text[:40_000])
        write_json(aside / "rows.json", [ids[at : at + _ROW] for at in range(0, len(ids) - _ROW, _ROW)])


def _describe(base: Path, bundle: Path, file: str) -> None:
    copy_tokenizer(base, bundle)
    tokenizer = TextTokenizer.load(bundle)
    session, _ = open_session(bundle / file, threads=0, provider="cpu")
    inputs = [i.name for i in session.get_inputs()]
    decoder = Decoder(file, inputs, reads_tokens(session) is not None, tokenizer.stop_ids, tokenizer.pad_id, False)
    write_decoder_configs(base, bundle, decoder)


def _builder_graph(base: Path, folder: Path, python: str) -> None:
    """genai's own graph; its session, too, may keep past and present in one buffer."""
    words = ["-m", "onnxruntime_genai.models.builder", "-i", str(base), "-o", str(folder), "-p", "int4", "-e", "cpu"]
    subprocess.run([python, *words], stdout=sys.stderr, check=True)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    config = json.loads((folder / "genai_config.json").read_text("utf-8"))
    model.metadata_props.add(key=READS, value=str(config["model"]["context_length"]))
    onnx.save(model, folder / "model.onnx")


def cells_of(round_number: int, *, quick: bool) -> list[Cell]:
    """What a round reads: 2,048 tokens in every second one, 8 times as many in the first of the full run alone."""
    most = 2047 if round_number % 2 else 2048 if quick or round_number else 8 * 2048
    every = [
        Cell(prompt, rows, NEW_TOKENS, _REPEATS if prompt * rows < 2048 else 1)
        for rows, prompt in product((1, 8), PROMPTS)
    ]
    return [cell for cell in every if cell.prompt_tokens * cell.rows <= most]


def goes_on(done: int, elapsed: float, longest: float, *, quick: bool) -> bool:
    """Whether another round is begun. elapsed: seconds of all there were; longest: of the longest one."""
    return done < (_QUICK_ROUNDS if quick else _ROUNDS) and not (quick and done and elapsed + longest > _QUICK_SECONDS)


def table_of(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for every way and cell that was measured: tokens/s of all rows together, medians and the best."""
    done = [trial for trial in trials if "failed" not in trial]
    runs = [(trial, run) for trial in done for run in trial["runs"]]
    found = []
    for prompt, rows in dict.fromkeys((run["prompt_tokens"], run["rows"]) for _, run in runs):
        for way in dict.fromkeys(each["way"] for each in done):
            mine = [(t, r) for t, r in runs if (t["way"], r["prompt_tokens"], r["rows"]) == (way, prompt, rows)]
            if mine:
                found.append(line(*map(list, zip(*mine, strict=True)), done))
    return found


def line(of: list[dict[str, Any]], runs: list[dict[str, Any]], trials: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table. runs: one way's of one cell, each of the trial in `of`; trials: all there are."""
    first, way = runs[0], of[0]["way"]
    found = {"way": way, "prompt_tokens": first["prompt_tokens"], "rows": first["rows"]}
    read = first["prompt_tokens"] * first["rows"]
    for name, tokens in (
        ("prefill", read),
        ("prefill_processor", read),
        ("decode", first["rows"]),
        ("decode_processor", first["rows"]),
    ):
        seconds = [value for run in runs for value in run["seconds"][name]]
        found |= {name: tokens / statistics.median(seconds), f"best_{name}": tokens / min(seconds)}
    counted = [run["joules"] / run["repeats"] for run in runs if run["joules"] is not None]
    return found | {
        "first_token_seconds": statistics.median(value for run in runs for value in run["seconds"]["prefill"]),
        "load_seconds": statistics.median(trial["load_seconds"] for trial in of),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "joules": statistics.median(counted) if counted else None,
        "perplexity": next((t["perplexity"] for t in trials if t["way"] == way and t["perplexity"]), None),
        "trials": len(runs),
    }


def ratios(table: list[dict[str, Any]], weight_bytes: int, bandwidth: float) -> dict[str, dict[str, float]]:
    """By cell: qft to the best peer, on the wall and of processor time; weights read of what memory gives."""
    found = {}
    for prompt, count in dict.fromkeys((row["prompt_tokens"], row["rows"]) for row in table):
        rows = {row["way"]: row for row in table if (row["prompt_tokens"], row["rows"]) == (prompt, count)}
        peers = [row for way, row in rows.items() if not WAYS[way].ours]
        if OURS not in rows or not peers:
            continue
        ours, cell = rows[OURS], {}
        for name in ("prefill", "prefill_processor", "decode", "decode_processor"):
            cell[f"{name}_vs_best_peer"] = ours[name] / max(peer[name] for peer in peers)
            if RAW in rows:
                cell[f"{name}_vs_raw_session"] = ours[name] / rows[RAW][name]
        cell["share_of_bandwidth"] = ours["decode"] / count * weight_bytes / bandwidth
        found[name_of(prompt, count)] = cell
    return found


def name_of(prompt: int, rows: int) -> str:
    """Of a cell: `256 tokens x 8`."""
    return f"{prompt} tokens x {rows}"


def encoder_ratio(found: dict[str, Any]) -> float:
    """Of what `benchmarks.encoders` wrote: that target of ours which is the faster against the best peer, as a geometric mean over the
    kinds of batches.
    """
    by_target: dict[str, list[float]] = defaultdict(list)
    for name, value in found["result"].items():
        target = name.partition(",")[0]
        if name != "table" and not target.endswith("_processor"):
            by_target[target].append(value)
    return max(map(statistics.geometric_mean, by_target.values()))


def whisper_ratio(found: dict[str, Any]) -> float:
    """Of what `benchmarks.speech` wrote: both in int8, both hearing 30 seconds."""
    return float(found["result"]["qft, cpu-int8, 30 s, times_real"])


def result(cells: dict[str, dict[str, float]], others: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What issue and README promise; of decoders after one prompt of 256 tokens. others: what their own benchmarks wrote."""
    shown = cells.get(name_of(*_SHOWN_CELL), {})
    found = {
        name: shown[name] for name in ("decode_vs_best_peer", "prefill_vs_best_peer", "share_of_bandwidth") if shown
    }
    of = {"encoders": ("encoder_vs_peer", encoder_ratio), "speech": ("whisper_vs_peer", whisper_ratio)}
    return found | {of[name][0]: of[name][1](each) for name, each in others.items()}


def as_markdown(table: list[dict[str, Any]]) -> str:
    """The table for people: tokens/s on the wall, of processor time in brackets."""
    lines = [
        "| way | prompt | prefill, tokens/s | first token | decode, tokens/s | load | memory | energy | perplexity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in table:
        energy = "" if r["joules"] is None else f"{r['joules']:.0f} J"
        perplexity = "" if r["perplexity"] is None else f"{r['perplexity']:.2f}"
        lines.append(
            f"| {r['way']} | {r['prompt_tokens']} x {r['rows']} | {r['prefill']:.0f} ({r['prefill_processor']:.0f}) | "
            f"{1000 * r['first_token_seconds']:.0f} ms | {r['decode']:.0f} ({r['decode_processor']:.0f}) | "
            f"{r['load_seconds']:.2f} s | {r['peak_memory_bytes'] / 1e6:.0f} MB | {energy} | {perplexity} |"
        )
    return "\n".join(lines)


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s of every way after prompts of 256 tokens: prefill and decode, one row and eight."""
    from matplotlib.figure import Figure

    prompt, _ = _SHOWN_CELL
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    figure.suptitle("green: graphs that qft made", x=0.01, ha="left", fontsize=9)
    for axes, (rows, name) in zip(figure.subplots(2, 2).flat, product((1, 8), ("prefill", "decode")), strict=True):
        shown = [row for row in table if (row["prompt_tokens"], row["rows"]) == (prompt, rows)][::-1]
        colours = ["#2f7d6d" if WAYS[row["way"]].ours else "#9aa5b1" for row in shown]
        bars = axes.barh([row["way"] for row in shown], [row[name] for row in shown], color=colours, height=0.65)
        axes.bar_label(bars, [f"{row[name]:,.0f}" for row in shown], padding=3)
        axes.set_xlim(0, 1.15 * max((row[name] for row in shown), default=1))
        axes.set_title(f"{name}, {rows} x {prompt} tokens: tokens/s", loc="left", fontsize=10)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def operators(model: Path, threads: int, *, read: int, new: int, runs: int) -> dict[str, float]:
    """Milliseconds of reading `new` tokens after `read`, by kind of operator, as onnxruntime's profiler counts them.

    Medians of some runs. model: one whose past and present may be one buffer.
    """
    options, numpy_value = ort.SessionOptions(), ort.OrtValue.ortvalue_from_numpy
    options.intra_op_num_threads, options.enable_profiling = threads, True
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(model, options)
        past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
        buffers = {n: numpy_value(np.zeros((1, s[1], read + new, s[3]), np.float32)) for n, s in past.items()}
        given = {"input_ids": np.full((1, new), 7), "attention_mask": np.ones((1, read + new), np.int64)}
        if KEPT_LOGITS in {i.name for i in session.get_overridable_initializers()}:
            given[KEPT_LOGITS] = np.array(1)
        for _ in range(runs):  # the same tokens again and again: the work does not depend on what is in the past
            binding = session.io_binding()
            for name, value in given.items():
                binding.bind_ortvalue_input(name, numpy_value(value))
            for name, buffer in buffers.items():
                binding.bind_ortvalue_input(name, buffer)
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
            binding.bind_output("logits")
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return by_operator(events)


def by_operator(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a run by kind of operator, medians, out of what onnxruntime's profiler wrote."""
    runs = [e for e in events if e["name"] == "model_run"]
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(runs))
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("kernel_time"):
            number = bisect([run["ts"] for run in runs], event["ts"]) - 1
            spent[event["args"]["op_name"]][number] += event["dur"] / 1000
    spent["whole run"] = [run["dur"] / 1000 for run in runs]
    return {name: statistics.median(values) for name, values in spent.items() if max(values) > _SHOWN}


def run(words: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Every trial; those that are done are in the file as soon as they are. Raises CalledProcessError if qft's own fails."""
    there = packages(words.peers, *(way.needs for way in WAYS.values() if way.needs))
    if not words.folder.exists():
        prepare(words.folder, words.peers if "onnxruntime_genai" in there else None)
    ways = [name for name, way in WAYS.items() if way.needs is None or way.needs in there]
    trials: list[dict[str, Any]] = []
    began, number, longest = time.monotonic(), 0, 0.0
    while goes_on(number, time.monotonic() - began, longest, quick=words.quick):
        round_began = time.monotonic()
        cells = cells_of(number, quick=words.quick)
        work = Work(str(words.folder), physical_cores(), cells, rows=0 if number else _TEXTS)
        for way in ways:
            try:
                done = trial("runtime", way, asdict(work), words.peers if WAYS[way].needs else sys.executable)
            except subprocess.CalledProcessError as error:
                if WAYS[way].ours:
                    raise
                done = {"way": way, "failed": str(error.returncode)}
            trials.append({"round": number, **done})
            write_json(words.json, about | {"trials": trials})
        number, longest = number + 1, max(longest, time.monotonic() - round_began)
    return trials


def main() -> None:
    """Run, print the table, write the JSON, draw; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="as many rounds as fit, at most three instead of seven")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/benchmark-runtime"), help="models; made if it is not there"
    )
    results = Path(__file__).parent / "results"
    for name in ("encoders", "speech"):
        parser.add_argument(
            f"--{name}", type=Path, default=results / f"{name}.json", help=f"what `benchmarks.{name}` wrote"
        )
    parser.add_argument("--json", type=Path, required=True, help="where every trial goes; the picture lies beside it")
    words = parser.parse_args()
    others = {name: json.loads(getattr(words, name).read_text("utf-8")) for name in ("encoders", "speech")}
    about = {"quick": words.quick, "machine": asdict(machine()), "versions": versions()}
    trials = run(words, about)
    threads, table = physical_cores(), table_of(trials)
    bandwidth = memory_bandwidth(threads=threads)
    models = {OURS: words.folder / "fused/onnx/model_q4.onnx", RAW: words.folder / "genai/model.onnx"}
    spent = {
        way: {
            name_of(prompt, 1): {
                "prefill": operators(model, threads, read=0, new=prompt, runs=_PROFILED_PREFILLS),
                "decode": operators(model, threads, read=prompt, new=1, runs=_PROFILED),
            }
            for prompt in PROMPTS
        }
        for way, model in models.items()
        if model.exists()
    }
    cells = ratios(table, sum(f.stat().st_size for f in models[OURS].parent.glob("*_data")), bandwidth)
    found = result(cells, others)
    about |= {"bandwidth_bytes_per_second": bandwidth, "milliseconds_by_operator": spent}
    about |= {name: {"machine": each["machine"], "result": each["result"]} for name, each in others.items()}
    write_json(words.json, about | {"trials": trials, "result": found | {"cells": cells, "table": table}})
    draw(table, words.json.with_suffix(".png"))
    print(as_markdown(table))
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
