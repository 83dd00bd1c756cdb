"""An ONNX language model under onnxruntime: logits of batches, greedy generation with a key-value cache. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil

from qft.data.encode import shared_prefix
from qft.errors import InputError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
_PACKAGES = {"cuda": "onnxruntime-gpu", "directml": "onnxruntime-directml", "openvino": "onnxruntime-openvino"}
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class Cache:
    """What a prefill leaves behind: present keys and values, the attention mask, the next position of each row."""

    values: dict[str, Any]
    mask: np.ndarray
    positions: np.ndarray

    def repeated(self, count: int) -> Cache:
        """That of one row, for `count` rows that go on from it."""
        mask, positions = (np.repeat(part, count, axis=0) for part in (self.mask, self.positions))
        return Cache(_repeated(self.values, count), mask, positions)


def _repeated(values: dict[str, Any], count: int) -> dict[str, Any]:
    return {n: ort.OrtValue.ortvalue_from_numpy(np.repeat(v.numpy(), count, axis=0)) for n, v in values.items()}


def physical_cores() -> int:
    """Cores to run on by default."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def open_session(model: Path, *, threads: int, provider: str) -> tuple[ort.InferenceSession, int]:
    """A session and the threads it runs on (0: one a physical core).

    Raises InputError if the provider is not there (never a silent fall back to the CPU) or the file is no model.
    """
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        there = [name for name, full in PROVIDERS.items() if full in ort.get_available_providers()]
        package = _PACKAGES.get(provider)
        raise InputError(
            f"this onnxruntime has no {provider} provider; it has {', '.join(there)}",
            where="--provider",
            hint=f"python -m pip uninstall --yes onnxruntime\n  python -m pip install {package}"
            if package
            else "use --provider cpu",
        )
    if not model.exists():
        raise InputError(f"no model at {model}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider == "cuda":
        ort.preload_dlls()  # CUDA's and cuDNN's libraries out of pip's packages, torch's among them
    try:
        session = ort.InferenceSession(str(model), options, providers=[wanted])
    except Exception as error:  # onnxruntime's own errors share no base but Exception
        raise InputError(
            f"onnxruntime cannot open {model}: {str(error).splitlines()[0][:200]}",
            hint="`qft check` compares a bundle's files with their hashes",
        ) from None
    if wanted not in session.get_providers():
        raise InputError(
            f"onnxruntime could not start the {provider} provider",
            where="--provider",
            hint="its libraries or the card's driver are missing; `qft doctor` shows what is there",
        )
    return session, options.intra_op_num_threads


class OnnxRunner:
    """Runs a decoder with past, as optimum exports it."""

    def __init__(self, model: Path, *, pad_id: int, threads: int = 0, provider: str = "cpu") -> None:
        """Raises InputError as `open_session` does."""
        self.session, self.threads = open_session(model, threads=threads, provider=provider)
        self.pad_id = pad_id
        self._outputs = [o.name for o in self.session.get_outputs()]
        inputs = {i.name: i for i in self.session.get_inputs()}
        self._named_positions = "position_ids" in inputs
        self._past = {
            name: (i.shape, FLOATS[i.type]) for name, i in inputs.items() if name.startswith("past_key_values.")
        }

    def prefill(self, rows: Sequence[Sequence[int]], *, keep: int = 1) -> tuple[np.ndarray, Cache]:
        """Feed left-padded rows; float32 logits (rows, at least the last `keep` positions, vocabulary) and the cache.

        What all rows share is computed once.
        """
        same = shared_prefix(rows, keep=keep)
        rest = [r[same:] for r in rows]
        width = max(map(len, rest))
        ids = np.array([[self.pad_id] * (width - len(r)) + list(r) for r in rest], dtype=np.int64)
        mask = np.array([[1] * same + [0] * (width - len(r)) + [1] * len(r) for r in rest], dtype=np.int64)
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, same:]
        return self._run(ids, mask, positions, self._past_of(rows[0][:same], len(rows)))

    def _past_of(self, prefix: Sequence[int], count: int) -> dict[str, Any]:
        """Keys and values of a prefix, for `count` rows; empty ones for an empty prefix."""
        if prefix:
            return _repeated(self.prefill([prefix])[1].values, count)
        empty = {name: np.zeros((count, s[1], 0, s[3]), dtype=kind) for name, (s, kind) in self._past.items()}
        return {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in empty.items()}

    def step(self, tokens: Sequence[int], cache: Cache) -> tuple[np.ndarray, Cache]:
        """Feed one token a row; float32 logits (rows, 1, vocabulary) and the grown cache."""
        return self.extend([[token] for token in tokens], cache)

    def extend(self, rows: Sequence[Sequence[int]], cache: Cache) -> tuple[np.ndarray, Cache]:
        """Feed equally many more tokens a row; float32 logits (rows, at least the last one, vocabulary) and the grown cache."""
        ids = np.array(rows, dtype=np.int64)
        mask = np.concatenate([cache.mask, np.ones_like(ids)], axis=1)
        return self._run(ids, mask, cache.positions[:, None] + np.arange(ids.shape[1]), cache.values)

    def _run(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: dict[str, Any]
    ) -> tuple[np.ndarray, Cache]:
        feed = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(ids),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(mask),
            **past,
        }
        if self._named_positions:
            feed["position_ids"] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(positions))
        results = dict(zip(self._outputs, self.session.run_with_ort_values(self._outputs, feed), strict=True))
        values = {name: results[name.replace("past_key_values", "present")] for name in self._past}
        return results["logits"].numpy().astype(np.float32, copy=False), Cache(values, mask, positions[:, -1] + 1)

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray:
        """float32 (rows, keep, vocabulary): logits at the last `keep` positions of left-padded rows."""
        return self.prefill(rows, keep=keep)[0][:, -keep:]

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations; each ends with its stop token if one came."""
        logits, cache = self.prefill(prompts)
        out: list[list[int]] = [[] for _ in prompts]
        for count in range(max_new_tokens):
            tokens = logits[:, -1].argmax(-1).tolist()
            for row, token in zip(out, tokens, strict=True):
                if not row or row[-1] not in stop_ids:
                    row.append(token)
            if all(row[-1] in stop_ids for row in out) or count + 1 == max_new_tokens:
                break
            logits, cache = self.step(tokens, cache)
        return out
