"""One way of running a small encoder, in a process of its own: `python -m benchmarks.peers.encoders WAY WORK_JSON`.

Prints a JSON object: seconds to load and of every batch, on the wall and of processor time, peak memory, and the texts' vectors.
sentence-transformers is imported by its own way only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qft.bundle.embedder import OnnxEmbedder
from qft.measure.machine import peak_memory

OURS = ("qft, cpu-int8", "qft, cpu-float32")
SENTENCE_TRANSFORMERS = "sentence-transformers, ONNX O3"
PEERS = ("optimum O3", "optimum's export", SENTENCE_TRANSFORMERS)
WAYS = {
    "qft, cpu-int8": "int8/model.onnx",
    "qft, cpu-float32": "float32/model.onnx",
    "qft, cpu-int4": "int4/model.onnx",
    "optimum O3": "o3/model.onnx",
    "optimum's export": "export/model.onnx",
    SENTENCE_TRANSFORMERS: "sentence-transformers",  # a folder of its own layout, with optimum's O3 graph
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


class Encoder(Protocol):
    """A model that turns tokens of texts into vectors."""

    def embed(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (rows, size)."""


class SentenceTransformers:
    """Its ONNX backend, from tokens on: its tokenizer's time is not counted, as it is not of the others."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime
        from sentence_transformers import SentenceTransformer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = {"session_options": options, "provider": "CPUExecutionProvider", "file_name": "model.onnx"}
        self._model = SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs=session)

    def embed(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (rows, size)."""
        import torch

        with torch.inference_mode():
            return self._model(self._model.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))[
                "sentence_embedding"
            ].numpy()


def _open(way: str, work: Work) -> Encoder:
    path = Path(work.folder) / WAYS[way]
    if way == SENTENCE_TRANSFORMERS:
        return SentenceTransformers(path, work.threads)
    return OnnxEmbedder(path, pad_id=0, temperature=1.0, threads=work.threads)


def _timed(encoder: Encoder, name: str, texts: list[list[int]], work: Work) -> dict[str, Any]:
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
        encoder = _open(way, work)
        load = time.perf_counter() - began
        runs = [_timed(encoder, name, texts[name], work) for name in work.batches]
    vectors = np.concatenate([encoder.embed([text]) for text in texts[next(iter(work.batches))]])
    found = {"load_seconds": load, "runs": runs, "peak_memory_bytes": peak.bytes}
    print(json.dumps(found | {"vectors": vectors.astype(np.float64).round(6).tolist()}))


if __name__ == "__main__":
    main()
