"""An ONNX classifier under onnxruntime: logits of batches of texts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from qft.bundle.session import SessionKeys, open_session
from qft.data.labelled import Labelled


@dataclass(frozen=True)
class Labels:
    """Names in the order of the logits. several: a row may have any number of them, each decided by a sigmoid."""

    names: tuple[str, ...]
    several: bool

    @property
    def between(self) -> str:
        """What stands between several labels in an answer: a comma, or a semicolon where a label holds a comma itself."""
        return "; " if any(", " in name for name in self.names) else ", "

    def named_in(self, answer: str) -> list[str]:
        """The labels of an answer."""
        if not self.several:
            return [answer]
        return answer.split(self.between) if answer else []

    def sets(self, answers: Sequence[str]) -> np.ndarray:
        """int (answers, labels): 1 where an answer names a label."""
        place = {name: number for number, name in enumerate(self.names)}
        found = np.zeros((len(answers), len(self.names)), dtype=int)
        for number, answer in enumerate(answers):
            for name in self.named_in(answer):
                found[number, place[name]] = 1
        return found

    def decide(self, logits: np.ndarray, temperature: float = 1.0) -> tuple[str, float]:
        """The likeliest answer for logits (labels,), and its probability."""
        if self.several:
            answer = self.between.join(name for name, value in zip(self.names, logits, strict=True) if value > 0)
        else:
            answer = self.names[int(logits.argmax())]
        return answer, float(self.probability(answer, logits, temperature))

    def probability(self, answer: str, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Of an answer, for logits (…, labels). With several labels that of the whole set, taken as independent."""
        scaled, named = logits.astype(np.float64) / temperature, self.sets([answer])[0] > 0
        if self.several:
            return np.asarray(np.exp(-np.logaddexp(0, np.where(named, -scaled, scaled)).sum(-1)))
        likely = np.exp(scaled - scaled.max(-1, keepdims=True))
        return np.asarray(likely[..., named][..., 0] / likely.sum(-1))

    def named(self, row: Labelled) -> str:
        """The answer expected of a row."""
        return self.between.join(self.names[number] for number in row.labels)


@dataclass(frozen=True)
class Decision:
    """A text's label (several: with `Labels.between` between them), its calibrated probability, and whether it may be relied on."""

    text: str
    probability: float
    accepted: bool

    def __str__(self) -> str:
        return f"{self.text or '(none)'}  {self.probability:.0%}{'' if self.accepted else '  unsure'}"


class OnnxClassifier:
    """Runs a model with a head over labels, as optimum exports it."""

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
        self._named = {i.name for i in self.session.get_inputs()}

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray:
        """float32 (rows, 1, labels), whatever `keep` is: a text has one answer."""
        width = max(map(len, rows))
        feed = {
            "input_ids": np.array([list(r) + [self.pad_id] * (width - len(r)) for r in rows], dtype=np.int64),
            "attention_mask": np.array([[1] * len(r) + [0] * (width - len(r)) for r in rows], dtype=np.int64),
        }
        if "token_type_ids" in self._named:
            feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
        return self.session.run(["logits"], feed)[0].astype(np.float32, copy=False)[:, None]

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 1, stop_ids: Sequence[int] = ()
    ) -> list[list[int]]:
        """The likeliest label's place: for a golden case, a classifier writes one token of a vocabulary of labels."""
        return [[int(row[-1].argmax())] for row in self.logits(prompts, 1)]
