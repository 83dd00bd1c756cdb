"""One way of running a small language model, in a process of its own: `python -m benchmarks.peers.runtime WAY WORK_JSON`.

Prints a JSON object: seconds to load, of every prefill and of every step, peak memory, joules and perplexity. A peer is
imported only by its own way, so that an environment without it can run the others.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qft.bundle.session import OnnxRunner
from qft.measure.agreement import log_softmax
from qft.measure.energy import energy_meter
from qft.measure.machine import peak_memory

_WARM_UP = 8  # tokens


@dataclass(frozen=True)
class Cell:
    """`rows` prompts of `prompt_tokens` each, read together, and `new_tokens` decoded after each of them, greedily.

    Done `repeats` times after one that does not count, of which a few tokens are decoded.
    """

    prompt_tokens: int
    rows: int
    new_tokens: int
    repeats: int


@dataclass(frozen=True)
class Work:
    """folder: with the models, see `benchmarks.runtime`. rows: texts whose perplexity is taken, 256 tokens each."""

    folder: str
    threads: int
    cells: list[Cell]
    rows: int


class Peer(Protocol):
    """A model that goes on from rows of equally many tokens."""

    def restart(self, rows: int, longest: int) -> None:
        """Forget what was read; at most `longest` tokens of each of `rows` rows will be."""

    def prefill(self, rows: list[list[int]]) -> list[int]:
        """Read the rows; each one's likeliest next token."""

    def step(self, tokens: list[int]) -> list[int]:
        """Read these, which `prefill` or the step before gave; the likeliest after them."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 (tokens, vocabulary) of a text alone."""


class Session:
    """qft's own runner: a raw onnxruntime session, with past and present in one buffer where the graph is made for that."""

    def __init__(self, model: Path, threads: int) -> None:
        self._runner = OnnxRunner(model, pad_id=0, threads=threads)
        self._cache: Any = None

    def restart(self, rows: int, longest: int) -> None:
        self._cache = None

    def prefill(self, rows: list[list[int]]) -> list[int]:
        logits, self._cache = self._runner.prefill(rows)
        return logits[:, -1].argmax(-1).tolist()

    def step(self, tokens: list[int]) -> list[int]:
        logits, self._cache = self._runner.step(tokens, self._cache)
        return logits[:, -1].argmax(-1).tolist()

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._runner.logits([ids], len(ids))[0]


class Genai:
    """onnxruntime-genai's own loop; no row of it ends before the others."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._genai, self._model = genai, genai.Model(config)

    def restart(self, rows: int, longest: int) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=rows, min_length=longest, max_length=longest, do_sample=False)
        self._generator = self._genai.Generator(self._model, parameters)

    def prefill(self, rows: list[list[int]]) -> list[int]:
        self._generator.append_tokens(np.array(rows, dtype=np.int32))
        return self._next()

    def step(self, tokens: list[int]) -> list[int]:
        return self._next()  # it reads what it chose itself

    def _next(self) -> list[int]:
        self._generator.generate_next_token()
        return self._generator.get_next_tokens().tolist()

    def logits(self, ids: list[int]) -> np.ndarray:
        self.restart(1, len(ids) + 1)
        self._generator.append_tokens(np.array([ids], dtype=np.int32))
        return np.array(self._generator.get_output("logits"), dtype=np.float32)[0]


class Transformers:
    """A model of transformers' kind, called as its `generate` does: torch's own, or optimum's around onnxruntime."""

    def __init__(self, model: Any, **only_last: int) -> None:
        """only_last: what it takes to form the last position's logits alone."""
        self._model, self._only_last = model, only_last

    def restart(self, rows: int, longest: int) -> None:
        self._past, self._count = None, 0

    def prefill(self, rows: list[list[int]]) -> list[int]:
        return self._run(rows, self._only_last)[:, -1].argmax(-1).tolist()

    def step(self, tokens: list[int]) -> list[int]:
        return self._run([[token] for token in tokens], self._only_last)[:, -1].argmax(-1).tolist()

    def logits(self, ids: list[int]) -> np.ndarray:
        self.restart(1, len(ids))
        return self._run([ids], {})[0].float().numpy()

    def _run(self, rows: list[list[int]], how: dict[str, int]) -> Any:
        import torch

        ids = torch.tensor(rows)
        places = torch.arange(self._count, self._count + ids.shape[1]).repeat(len(rows), 1)
        self._count += ids.shape[1]
        seen = torch.ones((len(rows), self._count), dtype=torch.int64)
        with torch.inference_mode():
            out = self._model(
                input_ids=ids,
                attention_mask=seen,
                position_ids=places,
                past_key_values=self._past,
                use_cache=True,
                **how,
            )
        self._past = out.past_key_values
        return out.logits


def _ort_model(folder: Path, threads: int) -> Transformers:
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    where = {"subfolder": "onnx", "file_name": "model_q4.onnx"}
    return Transformers(ORTModelForCausalLM.from_pretrained(folder, session_options=options, **where))


def _torch(folder: Path, threads: int) -> Transformers:
    """The weights as they are before any rounding, in the type that this processor multiplies faster."""
    import torch
    from transformers import AutoModelForCausalLM

    from qft.device import compute_type

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_type("auto")).eval()
    return Transformers(model, logits_to_keep=1)


class LlamaCpp:
    """llama.cpp, by the functions of llama-cpp-python that read several rows at once."""

    def __init__(self, model: Path, threads: int) -> None:
        import llama_cpp

        llama_cpp.llama_log_set(_silent(llama_cpp), None)
        llama_cpp.llama_backend_init()
        self._lib, self._threads, self._context = llama_cpp, threads, None
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def restart(self, rows: int, longest: int) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        how = self._lib.llama_context_default_params()
        how.n_ctx, how.n_seq_max, how.n_batch, how.n_ubatch = rows * -(-longest // 256) * 256, rows, 2048, 512
        how.n_threads = how.n_threads_batch = self._threads
        self._context, self._count = self._lib.llama_init_from_model(self._model, how), 0

    def prefill(self, rows: list[list[int]]) -> list[int]:
        each = max(1, 2048 // len(rows))
        for start in range(0, len(rows[0]), each):
            part = [row[start : start + each] for row in rows]
            found = self._read(part, every=False)
        return found.argmax(-1).tolist()

    def step(self, tokens: list[int]) -> list[int]:
        return self._read([[token] for token in tokens], every=False).argmax(-1).tolist()

    def logits(self, ids: list[int]) -> np.ndarray:
        self.restart(1, len(ids))
        return self._read([ids], every=True)

    def _read(self, rows: list[list[int]], *, every: bool) -> np.ndarray:
        """float32 (rows, or tokens, vocabulary): of each row's last token, or of every one."""
        width = len(rows[0])
        batch = self._lib.llama_batch_init(len(rows) * width, 0, 1)
        batch.n_tokens = len(rows) * width
        for number in range(batch.n_tokens):
            row, at = divmod(number, width)
            batch.token[number], batch.pos[number] = rows[row][at], self._count + at
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
            batch.logits[number] = every or at + 1 == width
        failed = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")
        self._count += width
        count = width if every else len(rows)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape=(count, self._words)).copy()


def _silent(lib: Any) -> Any:
    _silent.kept = lib.llama_log_callback(lambda *_: None)  # type: ignore[attr-defined]  # C calls it as long as the process lives
    return _silent.kept  # type: ignore[attr-defined]


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
    "ORTModel, qft's bundle": Way(lambda folder, threads: _ort_model(folder / "fused", threads), ours=True),
    "raw session, not fused": Way(lambda folder, threads: Session(folder / "plain/onnx/model_q4.onnx", threads)),
    "ORTModel, not fused": Way(lambda folder, threads: _ort_model(folder / "plain", threads)),
    "raw session, genai's graph": Way(
        lambda folder, threads: Session(folder / "genai/model.onnx", threads), "onnxruntime_genai"
    ),
    "genai runtime, genai's graph": Way(lambda folder, threads: Genai(folder / "genai", threads), "onnxruntime_genai"),
    "llama.cpp, Q4_1": Way(lambda folder, threads: LlamaCpp(folder / "model.gguf", threads), "llama_cpp"),
    "torch": Way(lambda folder, threads: _torch(folder / "base", threads)),
}


def _timed(peer: Peer, prompts: list[list[int]], cell: Cell) -> dict[str, Any]:
    """Seconds on the wall, and of processor time: the latter stand still while other programs have the core."""
    seconds: dict[str, list[float]] = {"prefill": [], "prefill_processor": [], "decode": [], "decode_processor": []}

    def timed(what: str, work: Callable[[list[Any]], list[int]], given: list[Any]) -> list[int]:
        began, worked = time.perf_counter(), time.process_time()
        tokens = work(given)
        seconds[f"{what}_processor"].append(time.process_time() - worked)
        seconds[what].append(time.perf_counter() - began)
        return tokens

    def once(new_tokens: int) -> None:
        peer.restart(cell.rows, cell.prompt_tokens + cell.new_tokens + 1)
        tokens = timed("prefill", peer.prefill, prompts)
        for _ in range(new_tokens):
            tokens = timed("decode", peer.step, tokens)

    with peak_memory() as peak:
        once(min(_WARM_UP, cell.new_tokens))
        for values in seconds.values():
            values.clear()
        with energy_meter() as meter:
            for _ in range(cell.repeats):
                once(cell.new_tokens)
    assert meter.energy is not None
    found = asdict(cell) | {"seconds": seconds, "peak_memory_bytes": peak.bytes}
    # An estimate is processor time by another name, so only what counters say is kept.
    return found | {"joules": meter.energy.joules if meter.energy.how == "counted" else None}


def _prompts(text: list[int], cell: Cell) -> list[list[int]]:
    """Rows that begin differently: what all rows share is read once by some."""
    shift = (len(text) - cell.prompt_tokens) // cell.rows
    return [text[row * shift : row * shift + cell.prompt_tokens] for row in range(cell.rows)]


def _perplexity(peer: Peer, rows: list[list[int]]) -> float:
    nats = []
    for row in rows:
        said = log_softmax(peer.logits(row)[:-1])
        nats += (-said[np.arange(len(row) - 1), row[1:]]).tolist()
    return float(np.exp(np.mean(nats)))


def main() -> None:
    """Run one way."""
    way, words = sys.argv[1], json.loads(sys.argv[2])
    work = Work(**words | {"cells": [Cell(**cell) for cell in words["cells"]]})
    folder = Path(work.folder)
    rows = json.loads((folder / "rows.json").read_text("utf-8"))
    text = [token for row in rows for token in row]
    began = time.perf_counter()
    peer = WAYS[way].open(folder, work.threads)
    load = time.perf_counter() - began
    runs = [_timed(peer, _prompts(text, cell), cell) for cell in work.cells]
    perplexity = _perplexity(peer, rows[: work.rows]) if work.rows else None
    print(json.dumps({"load_seconds": load, "runs": runs, "perplexity": perplexity}))


if __name__ == "__main__":
    main()
