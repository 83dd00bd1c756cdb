"""Speed of the shipped decoder beside other ways to run one: the same prompts, trials alternating, one process a trial.

    python -m benchmarks.runtime --quick --peers .venv-peers/bin/python --json FILE      # 3 rounds: 10 minutes on one core
    python -m benchmarks.runtime --peers .venv-peers/bin/python --json FILE              # 7 rounds

SmolLM2-135M-Instruct as it is, rounded to the nearest point of a grid: fused and not; as genai's builder makes it; as the package's own
GGUF (Q4_1). Blocks are of 32 everywhere. Batch 1. Speeds are medians over all trials, on the wall and by processor time, which says
more on a machine that others use as well. `make peers` makes the environment that has the peers; without it the others run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
import subprocess
import sys
from bisect import bisect
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.cells import MODEL
from benchmarks.peers import trial
from benchmarks.peers.runtime import WAYS, Work
from benchmarks.rounding_rows import DATA
from qft.base_model import local_checkpoint
from qft.bundle.assets import Decoder, copy_tokenizer, write_decoder_configs
from qft.bundle.session import READS, open_session, physical_cores, reads_tokens
from qft.data.tokenizer import TextTokenizer
from qft.files import folder_aside, write_json
from qft.graph.export_optimum import export_float
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.measure.machine import machine, memory_bandwidth, versions
from qft.quant.grids import Scheme, grids_of
from qft.sources import cache_folder, fetch
from qft.targets import FUSIONS, find_target

OURS, RAW = "qft", "raw session, genai's graph"
_ROW = 256  # tokens
_BLOCK = 32  # as genai's builder and Q4_1 have it
_PROFILED = 32  # runs
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
        if python:
            _builder_graph(base, aside / "genai", python)
        tokenizer = TextTokenizer.load(base)
        text = gzip.decompress((DATA / "tinyshakespeare/input.txt.gz").read_bytes()).decode()
        ids = tokenizer.encode(text[:20_000])
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


def packages(python: str) -> set[str]:
    """The peers that an interpreter has."""
    ask = "import importlib.util as u; print(*(n for n in ('onnxruntime_genai', 'llama_cpp') if u.find_spec(n)))"
    return set(subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, text=True, check=True).stdout.split())


def line(way: str, prompt: int, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """A way's line of the table for one length of prompt, out of its trials: tokens/s, medians and the best."""
    runs = [run["seconds"] for trial in trials for run in trial["runs"] if run["prompt_tokens"] == prompt]
    found: dict[str, Any] = {"way": way, "prompt_tokens": prompt}
    for name, tokens in (("prefill", prompt), ("prefill_processor", prompt), ("decode", 1), ("decode_processor", 1)):
        seconds = [value for run in runs for value in run[name]]
        found |= {name: tokens / statistics.median(seconds), f"best_{name}": tokens / min(seconds)}
    return found | {
        "load_seconds": statistics.median(trial["load_seconds"] for trial in trials),
        "peak_memory_bytes": max(trial["peak_memory_bytes"] for trial in trials),
        "perplexity": next(trial["perplexity"] for trial in trials if trial["perplexity"]),
    }


def result(table: list[dict[str, Any]], weight_bytes: int, bandwidth: float) -> dict[str, float]:
    """Ratios of qft to the best peer by length of prompt, on the wall and of processor time; weights read of what memory gives."""
    found = {}
    for prompt in dict.fromkeys(row["prompt_tokens"] for row in table):
        rows = {row["way"]: row for row in table if row["prompt_tokens"] == prompt}
        ours, peers = rows[OURS], [row for way, row in rows.items() if not WAYS[way].ours]
        for name in ("prefill", "prefill_processor", "decode", "decode_processor"):
            found[f"{name}_{prompt}_vs_best_peer"] = ours[name] / max(peer[name] for peer in peers)
            if RAW in rows:
                found[f"{name}_{prompt}_vs_raw_session"] = ours[name] / rows[RAW][name]
        found[f"share_of_bandwidth_{prompt}"] = ours["decode"] * weight_bytes / bandwidth
    return found


def as_markdown(table: list[dict[str, Any]]) -> str:
    """The table for people: tokens/s on the wall, of processor time in brackets."""
    lines = [
        "| way | prompt | prefill, tokens/s | decode, tokens/s | load | memory | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['way']} | {r['prompt_tokens']} | {r['prefill']:.0f} ({r['prefill_processor']:.0f}) | "
        f"{r['decode']:.0f} ({r['decode_processor']:.0f}) | {r['load_seconds']:.2f} s | "
        f"{r['peak_memory_bytes'] / 1e6:.0f} MB | {r['perplexity']:.2f} |"
        for r in table
    ]
    return "\n".join(lines)


def operators(model: Path, threads: int, prompt: int) -> dict[str, float]:
    """Milliseconds of one decoded token by kind of operator, as onnxruntime's profiler counts them: the median of 32 tokens."""
    options, numpy_value = ort.SessionOptions(), ort.OrtValue.ortvalue_from_numpy
    options.intra_op_num_threads, options.enable_profiling = threads, True
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(model, options)
        past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
        buffers = {n: numpy_value(np.zeros((1, s[1], prompt + 1, s[3]), np.float32)) for n, s in past.items()}
        for _ in range(
            _PROFILED
        ):  # the same last token again and again: the work does not depend on what is in the past
            binding = session.io_binding()
            binding.bind_ortvalue_input("input_ids", numpy_value(np.array([[7]])))
            binding.bind_ortvalue_input("attention_mask", numpy_value(np.ones((1, prompt + 1), np.int64)))
            for name, buffer in buffers.items():
                binding.bind_ortvalue_input(name, buffer)
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
            binding.bind_output("logits")
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    runs = [e for e in events if e["name"] == "model_run"]
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(runs))
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("kernel_time"):
            number = bisect([run["ts"] for run in runs], event["ts"]) - 1
            spent[event["args"]["op_name"]][number] += event["dur"] / 1000
    spent["whole run"] = [run["dur"] / 1000 for run in runs]
    return {name: statistics.median(values) for name, values in spent.items() if max(values) > _SHOWN}


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of seven")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/benchmark-runtime"), help="models; made if it is not there"
    )
    parser.add_argument("--json", type=Path, required=True, help="where every trial goes")
    words = parser.parse_args()
    there = packages(words.peers)
    if not words.folder.exists():
        prepare(words.folder, words.peers if "onnxruntime_genai" in there else None)
    threads = physical_cores()
    work = Work(str(words.folder), threads, prompts=(16, 256), new_tokens=64, repeats=2, rows=8)
    ways = [name for name, way in WAYS.items() if way.needs is None or way.needs in there]
    trials = [
        trial(
            "runtime",
            way,
            asdict(replace(work, rows=0 if round_number else work.rows)),
            words.peers if WAYS[way].needs else sys.executable,
        )
        for round_number in range(3 if words.quick else 7)
        for way in ways
    ]
    table = [line(way, prompt, [t for t in trials if t["way"] == way]) for prompt in work.prompts for way in ways]
    bandwidth = memory_bandwidth(threads=threads)
    model = words.folder / "fused/onnx/model_q4.onnx"
    found = {"quick": words.quick, "work": asdict(work), "machine": asdict(machine()), "versions": versions()}
    found |= {
        "bandwidth_bytes_per_second": bandwidth,
        "decode_milliseconds": operators(model, threads, max(work.prompts)),
    }
    ratios = result(table, model.with_name(f"{model.name}_data").stat().st_size, bandwidth)
    write_json(words.json, found | {"trials": trials, "result": ratios | {"table": table}})
    print(as_markdown(table))
    print("RESULT " + json.dumps(ratios))


if __name__ == "__main__":
    main()
