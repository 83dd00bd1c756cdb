"""One way of running a small language model, in a process of its own: `python -m benchmarks.peers.runtime WAY WORK_JSON`.

Prints a JSON object: seconds to load, of every prefill and of every decoded token, peak memory, and perplexity. A peer is
imported only by its own way, so that an environment without it can run the others.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qft.bundle.session import OnnxRunner
from qft.measure.agreement import log_softmax
from qft.measure.machine import peak_memory


@dataclass(frozen=True)
class Work:
    """folder: with the models, see `benchmarks.runtime`. rows: texts whose perplexity is taken, 256 tokens each.

    Each prompt is read and `new_tokens` are decoded after it, greedily, `repeats` times after one that does not count.
    """

    folder: str
    threads: int
    prompts: tuple[int, ...]
    new_tokens: int
    repeats: int
    rows: int


class Peer(Protocol):
    """A model that reads tokens one call after another."""

    def restart(self, longest: int) -> None:
        """Forget what was read; at most `longest` tokens will be."""

    def read(self, ids: list[int]) -> np.ndarray:
        """float32 (vocabulary,): logits after these, and all before them."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 (tokens, vocabulary) of a text alone."""


class Session:
    """qft's own runner: a raw onnxruntime session, with past and present in one buffer where the graph is made for that."""

    def __init__(self, model: Path, threads: int) -> None:
        self._runner = OnnxRunner(model, pad_id=0, threads=threads)
        self._cache: Any = None

    def restart(self, longest: int) -> None:
        del longest
        self._cache = None

    def read(self, ids: list[int]) -> np.ndarray:
        if self._cache is None:
            logits, self._cache = self._runner.prefill([ids])
        else:
            logits, self._cache = self._runner.extend([ids], self._cache)
        return logits[0, -1]

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._runner.logits([ids], len(ids))[0]


class Genai:
    """onnxruntime-genai's own loop."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._genai, self._model = genai, genai.Model(config)

    def restart(self, longest: int) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=longest, do_sample=False)
        self._generator = self._genai.Generator(self._model, parameters)

    def read(self, ids: list[int]) -> np.ndarray:
        self._generator.append_tokens(np.array([ids], dtype=np.int32))
        return np.array(self._generator.get_logits(), dtype=np.float32).reshape(-1)

    def logits(self, ids: list[int]) -> np.ndarray:
        self.restart(len(ids) + 1)
        self.read(ids)
        return np.array(self._generator.get_output("logits"), dtype=np.float32)[0]


class OrtModel:
    """optimum's ORTModelForCausalLM, called as `generate` calls it."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._model = ORTModelForCausalLM.from_pretrained(
            folder, subfolder="onnx", file_name="model_q4.onnx", session_options=options
        )

    def restart(self, longest: int) -> None:
        del longest
        self._past, self._count = None, 0

    def read(self, ids: list[int]) -> np.ndarray:
        return self._run(ids)[-1]

    def logits(self, ids: list[int]) -> np.ndarray:
        self.restart(len(ids))
        return self._run(ids)

    def _run(self, ids: list[int]) -> np.ndarray:
        import torch

        places = torch.arange(self._count, self._count + len(ids))[None]
        self._count += len(ids)
        seen = torch.ones((1, self._count), dtype=torch.int64)
        with torch.no_grad():
            out = self._model(
                input_ids=torch.tensor([ids]),
                attention_mask=seen,
                position_ids=places,
                past_key_values=self._past,
                use_cache=True,
            )
        self._past = out.past_key_values
        return out.logits[0].numpy()


class LlamaCpp:
    """llama.cpp, by llama-cpp-python."""

    def __init__(self, model: Path, threads: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            str(model), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._every = lambda: Llama(
            str(model), n_ctx=512, n_batch=512, n_threads=threads, logits_all=True, verbose=False
        )
        self._reader: Any = None

    def restart(self, longest: int) -> None:
        del longest
        self._llama.reset()

    def read(self, ids: list[int]) -> np.ndarray:
        self._llama.eval(ids)
        return np.ctypeslib.as_array(self._llama._ctx.get_logits(), shape=(self._llama.n_vocab(),)).copy()

    def logits(self, ids: list[int]) -> np.ndarray:
        self._reader = self._reader or self._every()
        self._reader.reset()
        self._reader.eval(ids)
        return self._reader.scores[: len(ids)].copy()


@dataclass(frozen=True)
class Way:
    """needs: a package beside qft's own. ours: whether the graph is made by qft."""

    open: Callable[[Path, int], Peer]
    needs: str | None = None
    ours: bool = False


WAYS = {
    "qft": Way(lambda folder, threads: Session(folder / "fused/onnx/model_q4.onnx", threads), ours=True),
    "genai runtime, qft's bundle": Way(
        lambda folder, threads: Genai(folder / "fused", threads), "onnxruntime_genai", ours=True
    ),
    "ORTModel, qft's bundle": Way(lambda folder, threads: OrtModel(folder / "fused", threads), ours=True),
    "raw session, not fused": Way(lambda folder, threads: Session(folder / "plain/onnx/model_q4.onnx", threads)),
    "ORTModel, not fused": Way(lambda folder, threads: OrtModel(folder / "plain", threads)),
    "raw session, genai's graph": Way(
        lambda folder, threads: Session(folder / "genai/model.onnx", threads), "onnxruntime_genai"
    ),
    "genai runtime, genai's graph": Way(lambda folder, threads: Genai(folder / "genai", threads), "onnxruntime_genai"),
    "llama.cpp, Q4_1": Way(lambda folder, threads: LlamaCpp(folder / "model.gguf", threads), "llama_cpp"),
}


def _timed(peer: Peer, prompt: list[int], work: Work) -> dict[str, Any]:
    """Seconds on the wall, and of processor time: the latter stand still while other programs have the core."""
    runs: dict[str, list[float]] = {"prefill": [], "prefill_processor": [], "decode": [], "decode_processor": []}

    def read(what: str, ids: list[int], counts: bool) -> int:
        began, worked = time.perf_counter(), time.process_time()
        token = int(peer.read(ids).argmax())
        if counts:
            runs[f"{what}_processor"].append(time.process_time() - worked)
            runs[what].append(time.perf_counter() - began)
        return token

    for repeat in range(work.repeats + 1):
        peer.restart(len(prompt) + work.new_tokens + 1)
        token = read("prefill", prompt, counts=repeat > 0)  # the first is warm-up
        for _ in range(work.new_tokens):
            token = read("decode", [token], counts=repeat > 0)
    return {"prompt_tokens": len(prompt), "seconds": runs}


def _perplexity(peer: Peer, rows: list[list[int]]) -> float:
    nats = []
    for row in rows:
        said = log_softmax(peer.logits(row)[:-1])
        nats += (-said[np.arange(len(row) - 1), row[1:]]).tolist()
    return float(np.exp(np.mean(nats)))


def main() -> None:
    """Run one way."""
    way, work = sys.argv[1], Work(**json.loads(sys.argv[2]))
    folder = Path(work.folder)
    rows = json.loads((folder / "rows.json").read_text("utf-8"))
    with peak_memory() as peak:
        began = time.perf_counter()
        peer = WAYS[way].open(folder, work.threads)
        load = time.perf_counter() - began
        text = [token for row in rows for token in row]
        runs = [_timed(peer, text[:length], work) for length in work.prompts]
    found = {"load_seconds": load, "runs": runs, "peak_memory_bytes": peak.bytes}
    print(json.dumps(found | {"perplexity": _perplexity(peer, rows[: work.rows]) if work.rows else None}))


if __name__ == "__main__":
    main()
