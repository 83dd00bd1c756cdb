"""An ONNX language model under onnxruntime: logits of batches, greedy generation with a key-value cache. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import onnxruntime as ort
import psutil

from qft.bundle.cache import Cache, Past
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
READS = "qft.reads_tokens"  # in the metadata of a graph whose attention is fused: how many tokens a row may have
KEPT_LOGITS = "num_logits_to_keep"  # an input of such a graph that need not be given: 0, for all
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def reads_tokens(session: ort.InferenceSession) -> int | None:
    """How many tokens a decoder reads at most that was fused by `qft.graph.attention`; None if it was not.

    Past and present of a fused one may be one buffer, longer than what is in it.
    """
    found = session.get_modelmeta().custom_metadata_map.get(READS)
    return None if found is None else int(found)


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Cores to run on by default."""
    allowed = usable_cores()
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


class SessionKeys(TypedDict, total=False):
    """What models pass on to `open_session` as it was given to them."""

    threads: int
    provider_options: Mapping[str, str]


def open_session(
    model: Path, *, provider: str, threads: int = 0, provider_options: Mapping[str, str] | None = None
) -> tuple[ort.InferenceSession, int]:
    """A session and the threads it runs on (0: one a physical core). provider_options: in the provider's own words.

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
        session = ort.InferenceSession(str(model), options, providers=[(wanted, dict(provider_options or {}))])
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


def past_device(provider: str) -> str:
    """Where keys and values stay between two steps."""
    return "cuda" if provider == "cuda" else "cpu"


def run_bound(
    session: ort.InferenceSession, feed: Mapping[str, ort.OrtValue], outputs: Sequence[str], *, stay_on: str
) -> dict[str, ort.OrtValue]:
    """Every output by name: logits come back, keys and values stay on the device that they will be fed from."""
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, "cpu" if name == "logits" else stay_on)
    session.run_with_iobinding(binding)
    return dict(zip(outputs, binding.get_outputs(), strict=True))


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")


class OnnxRunner:
    """Runs a decoder with past, as optimum exports it, or fused: then keys and values stay where they are, step after step."""

    def __init__(
        self,
        model: Path,
        *,
        pad_id: int,
        provider: str = "cpu",
        **session: Unpack[SessionKeys],
    ) -> None:
        """Raises InputError as `open_session` does."""
        self.session, self.threads = open_session(model, provider=provider, **session)
        self.pad_id = pad_id
        self._outputs = [o.name for o in self.session.get_outputs()]
        inputs = {i.name: i for i in self.session.get_inputs()}
        self._named_positions = "position_ids" in inputs
        self._past = {
            name: (i.shape, FLOATS[i.type]) for name, i in inputs.items() if name.startswith("past_key_values.")
        }
        self._longest = reads_tokens(self.session)
        self._fused = self._longest is not None
        self._keeps_logits = KEPT_LOGITS in {i.name for i in self.session.get_overridable_initializers()}
        self._in_place = self._fused and provider == "cpu"
        self._past_device = past_device(provider)

    def prefill(self, rows: Sequence[Sequence[int]], *, keep: int = 1) -> tuple[np.ndarray, Cache]:
        """Feed left-padded rows; float32 logits (rows, at least the last `keep` positions, vocabulary) and the cache.

        What all rows share is computed once.
        """
        same = shared_prefix(rows, keep=keep)
        rest = [list(row[same:]) for row in rows]
        width = max(map(len, rest))
        cache = self.prefill([rows[0][:same]])[1] if same else self._nothing_read(len(rows))
        if same and self._fused:
            read = [self.extend([row], cache, keep=keep) for row in rest]
            logits = [found[:, -keep:] for found, _ in read]
            return np.concatenate(logits), Cache.joined([grown for _, grown in read])
        if same:
            cache = cache.repeated(len(rows))
        ids = np.array([[self.pad_id] * (width - len(row)) + row for row in rest], dtype=np.int64)
        new = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rest], dtype=np.int64)
        positions = np.maximum(cache.positions[:, None] + new.cumsum(-1) - 1, 0)
        return self._run(ids, np.concatenate([cache.mask, new], axis=1), positions, cache.past, keep)

    def _nothing_read(self, rows: int) -> Cache:
        empty = {name: np.zeros((rows, s[1], 0, s[3]), dtype=kind) for name, (s, kind) in self._past.items()}
        past = Past({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in empty.items()}, 0)
        return Cache(past, np.zeros((rows, 0), np.int64), np.zeros(rows, np.int64))

    def step(self, tokens: Sequence[int], cache: Cache) -> tuple[np.ndarray, Cache]:
        """Feed one token a row; float32 logits (rows, 1, vocabulary) and the grown cache."""
        return self.extend([[token] for token in tokens], cache)

    def extend(self, rows: Sequence[Sequence[int]], cache: Cache, *, keep: int = 1) -> tuple[np.ndarray, Cache]:
        """Feed equally many more tokens a row; logits as of `prefill`, and the grown cache."""
        if self._fused and len(rows) > 1 and len(rows[0]) > 1:  # the fused attention reads on for one row at a time
            read = [self.extend([row], own, keep=keep) for row, own in zip(rows, self.rows(cache), strict=True)]
            return np.concatenate([logits for logits, _ in read]), Cache.joined([grown for _, grown in read])
        ids = np.array(rows, dtype=np.int64)
        mask = np.concatenate([cache.mask, np.ones_like(ids)], axis=1)
        return self._run(ids, mask, cache.positions[:, None] + np.arange(ids.shape[1]), cache.past, keep)

    def rows(self, cache: Cache) -> list[Cache]:
        """Each row's own, to be read on by itself."""
        return cache.rows(at_front=self._fused)

    def _run(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Past, keep: int
    ) -> tuple[np.ndarray, Cache]:
        if self._longest is not None and mask.shape[1] > self._longest:
            raise InputError(
                f"{mask.shape[1]:,} tokens are more than the {self._longest:,} that this bundle reads",
                hint="shorten the text or the conversation, or ask for fewer new tokens",
            )
        if self._in_place:
            past = past.with_room(mask.shape[1] - ids.shape[1], mask.shape[1])
        feed = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(ids),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(mask),
        }
        if self._named_positions:
            feed["position_ids"] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(positions))
        if self._keeps_logits:
            feed[KEPT_LOGITS] = ort.OrtValue.ortvalue_from_numpy(np.array(keep))
        if self._in_place:
            past.binding = past.binding or self._bound(past)
            for name, value in feed.items():
                past.binding.bind_ortvalue_input(name, value)
            past.binding.bind_output("logits")
            self.session.run_with_iobinding(past.binding)
            logits, past.used = past.binding.get_outputs()[-1], mask.shape[1]
        else:
            found = run_bound(self.session, feed | past.values, self._outputs, stay_on=self._past_device)
            logits, past = found["logits"], Past({n: found[_present(n)] for n in self._past}, mask.shape[1])
        return logits.numpy().astype(np.float32, copy=False), Cache(past, mask, positions[:, -1] + 1)

    def _bound(self, past: Past) -> ort.IOBinding:
        binding = self.session.io_binding()
        for name, value in past.values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(_present(name), value)
        return binding

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
