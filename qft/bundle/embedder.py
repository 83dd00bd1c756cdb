"""An ONNX model that turns texts into vectors, under onnxruntime, and which of some texts are near each other. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Unpack

import numpy as np

from qft.bundle.session import SessionKeys, open_session

OUTPUT = "sentence_embedding"  # as optimum's exporter of sentence-transformers names it
_NEAREST = 5
_TOGETHER = 32
NOT_OFFERED = -1e4  # the logit of a text's own place among what it may find


@dataclass(frozen=True)
class Embedding:
    """A text's vector, of length 1, and how many tokens were read."""

    embedding: list[float]
    tokens: int

    def __str__(self) -> str:
        return json.dumps(self.embedding)


@dataclass(frozen=True)
class Neighbours:
    """The nearest of some texts, the nearest first, and the cosines of their vectors with the one asked for."""

    texts: list[str]
    cosines: list[float]

    def __str__(self) -> str:
        return "\n".join(f"{cosine:.2f}  {text}" for text, cosine in zip(self.texts, self.cosines, strict=True))


def nearest(wanted: np.ndarray, offered: np.ndarray, texts: Sequence[str]) -> Neighbours:
    """At most five. wanted: (size,), offered: (texts, size), of length 1."""
    cosines = offered @ wanted
    order = np.argsort(-cosines, kind="stable")[:_NEAREST]
    return Neighbours([texts[i] for i in order], [float(cosines[i]) for i in order])


def neighbour_logits(vectors: np.ndarray, temperature: float) -> np.ndarray:
    """float32 (rows, 1, rows): each row's cosines with all of them over the temperature; none is its own neighbour.

    So vectors have a first choice and a distribution that two runtimes can be compared by.
    """
    logits = vectors @ vectors.T / np.float32(temperature)
    np.fill_diagonal(logits, NOT_OFFERED)
    return logits[:, None]


def embed_all(runner: OnnxEmbedder, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """float32 (texts, size) of any number of texts, those of like length together."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    parts = [order[start : start + _TOGETHER] for start in range(0, len(order), _TOGETHER)]
    return np.concatenate([runner.embed([texts[i] for i in part]) for part in parts])[np.argsort(order)]


def embeddings(runner: OnnxEmbedder, texts: Sequence[Sequence[int]]) -> list[Embedding]:
    """The vectors of texts given as token ids."""
    vectors = embed_all(runner, texts).tolist()
    return [Embedding(vector, len(text)) for vector, text in zip(vectors, texts, strict=True)]


class OnnxEmbedder:
    """Runs a graph whose mean over a text's tokens and whose division by its length lie inside."""

    def __init__(
        self,
        model: Path,
        *,
        pad_id: int,
        temperature: float,
        provider: str = "cpu",
        **session: Unpack[SessionKeys],
    ) -> None:
        """temperature: see `neighbour_logits`. Raises InputError as `open_session` does."""
        self.session, self.threads = open_session(model, provider=provider, **session)
        self.pad_id, self.temperature = pad_id, temperature
        self._named = {i.name for i in self.session.get_inputs()}

    @cached_property
    def size(self) -> int:
        """Of a vector, as the graph gives it: an exporter may leave its shapes open."""
        return int(self.embed([[self.pad_id]]).shape[-1])

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (texts, size) of length 1."""
        width = max(map(len, texts))
        feed = {
            "input_ids": np.array([list(t) + [self.pad_id] * (width - len(t)) for t in texts], dtype=np.int64),
            "attention_mask": np.array([[1] * len(t) + [0] * (width - len(t)) for t in texts], dtype=np.int64),
        }
        if "token_type_ids" in self._named:
            feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
        vectors: np.ndarray = self.session.run([OUTPUT], feed)[0].astype(np.float32, copy=False)
        return vectors

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray:
        """See `neighbour_logits`."""
        return neighbour_logits(self.embed(rows), self.temperature)
