"""One way of running a small encoder, in a process of its own: `python -m benchmarks.peers.encoders WAY WORK_JSON`.

Prints a JSON object: seconds to load and of every batch, on the wall and of processor time, peak memory, and the texts' vectors.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qft.bundle.embedder import OnnxEmbedder
from qft.measure.machine import peak_memory

OURS = ("qft, cpu-int8", "qft, cpu-float32")
PEERS = ("optimum O3", "optimum's export")
WAYS = {
    "qft, cpu-int8": "int8/model.onnx",
    "qft, cpu-float32": "float32/model.onnx",
    "qft, cpu-int4": "int4/model.onnx",
    "optimum O3": "o3/model.onnx",
    "optimum's export": "export/model.onnx",
}


@dataclass(frozen=True)
class Work:
    """folder: with the models and texts.json, see `benchmarks.encoders`. batches: name → how many texts go together.

    Each set of texts is read `repeats` times after one that does not count.
    """

    folder: str
    threads: int
    repeats: int
    batches: dict[str, int]


def _timed(encoder: OnnxEmbedder, name: str, texts: list[list[int]], work: Work) -> dict[str, Any]:
    """Batches of texts in the order they come, as an app would send them."""
    together = work.batches[name]
    batches = [texts[start : start + together] for start in range(0, len(texts), together)]
    found: dict[str, list[float]] = {"seconds": [], "processor_seconds": []}
    for repeat in range(work.repeats + 1):
        for batch in batches:
            began, worked = time.perf_counter(), time.process_time()
            encoder.embed(batch)
            if repeat:  # the first is warm-up
                found["processor_seconds"].append(time.process_time() - worked)
                found["seconds"].append(time.perf_counter() - began)
    return {
        "batches": name,
        "tokens": sum(map(len, texts)),
        "filled_up": sum(len(b) * max(map(len, b)) for b in batches),
    } | found


def main() -> None:
    """Run one way."""
    way, work = sys.argv[1], Work(**json.loads(sys.argv[2]))
    folder = Path(work.folder)
    texts: dict[str, list[list[int]]] = json.loads((folder / "texts.json").read_text("utf-8"))
    with peak_memory() as peak:
        began = time.perf_counter()
        encoder = OnnxEmbedder(folder / WAYS[way], pad_id=0, temperature=1.0, threads=work.threads)
        load = time.perf_counter() - began
        runs = [_timed(encoder, name, texts[name], work) for name in work.batches]
    vectors = np.concatenate([encoder.embed([text]) for text in texts[next(iter(work.batches))]])
    found = {"load_seconds": load, "runs": runs, "peak_memory_bytes": peak.bytes}
    print(json.dumps(found | {"vectors": vectors.astype(np.float64).round(6).tolist()}))


if __name__ == "__main__":
    main()
