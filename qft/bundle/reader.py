"""An ONNX model that finds answers in contexts, under onnxruntime, and which answer its logits stand for. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from qft.bundle.session import SessionKeys, open_session
from qft.data.windows import Window, text_numbers

PADDING = (
    -1e4
)  # the logit of a place that holds no token: large enough to have no share, finite so that differences are


@dataclass(frozen=True)
class Reading:
    """How logits become an answer. longest_answer: in tokens. may_be_none: the model has learnt that a context may hold none.

    no_answer_margin: nats that none must score above the best answer.
    """

    longest_answer: int
    no_answer_margin: float
    may_be_none: bool


@dataclass(frozen=True)
class Found:
    """An answer, its share of all that were possible, and its (begin, end) characters in the context; none: no text, no place."""

    text: str
    probability: float
    begin: int | None
    end: int | None

    def __str__(self) -> str:
        if self.begin is None:
            return f"(no answer)  {self.probability:.0%}"
        return f"{self.text}  {self.probability:.0%}  characters {self.begin}–{self.end}"


def find(windows: Sequence[Window], logits: Sequence[np.ndarray], how: Reading) -> Found:
    """The answer to a question. logits: float32 (2, places) of each of its windows, for an answer's first and last token.

    An answer scores the sum of its two logits; the best one of all windows is taken. No answer scores what the beginning of
    the text does, in the window where that is least (arXiv 1806.03822; BERT, arXiv 1810.04805, section 4.3).
    """
    best, total = -math.inf, -math.inf
    where: tuple[Window, int, int] | None = None
    for window, values in zip(windows, logits, strict=True):
        scores = span_scores(values, window, how.longest_answer)
        if not scores.size:
            continue
        total = np.logaddexp(total, np.logaddexp.reduce(scores, axis=None))
        first, more = divmod(int(scores.argmax()), scores.shape[1])
        if scores[first, more] > best:
            best, where = float(scores[first, more]), (window, window.first + first, window.first + first + more)
    none = min(float(values[0, 0]) + float(values[1, 0]) for values in logits) if how.may_be_none else -math.inf
    total = np.logaddexp(total, none)
    if where is None or none - best > how.no_answer_margin:
        return Found("", float(np.exp(none - total)) if where else 1.0, None, None)
    chosen, first, last = where
    begin, end = chosen.characters(first, last)
    return Found(chosen.said(begin, end), float(np.exp(best - total)), begin, end)


def span_scores(logits: np.ndarray, window: Window, longest: int) -> np.ndarray:
    """float64 (tokens, longest): the score of the answer that begins at a token of the context and is 1 … `longest` tokens long.

    -inf where it would go beyond the window.
    """
    part = logits[:, window.first : window.first + len(window.offsets)].astype(np.float64)
    count = part.shape[1]
    ends = np.pad(part[1], (0, longest), constant_values=-np.inf)
    places = np.arange(count)[:, None] + np.arange(min(longest, count))
    return part[0][:, None] + ends[places]


class OnnxReader:
    """Runs a model with logits for the first and the last token of an answer, as optimum exports it."""

    def __init__(
        self,
        model: Path,
        *,
        pad_id: int,
        pair_mark: int | None,
        provider: str = "cpu",
        **session: Unpack[SessionKeys],
    ) -> None:
        """pair_mark: see `TextTokenizer.pair_mark`. Raises InputError as `open_session` does."""
        self.session, self.threads = open_session(model, provider=provider, **session)
        self.pad_id, self.pair_mark = pad_id, pair_mark
        self._named = {i.name for i in self.session.get_inputs()}

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray:
        """float32 (rows, 2, longest), whatever `keep` is: the first and the last token of a row's answer, each among places."""
        width = max(map(len, rows))
        mask = np.array([[1] * len(r) + [0] * (width - len(r)) for r in rows], dtype=np.int64)
        feed = {
            "input_ids": np.array([list(r) + [self.pad_id] * (width - len(r)) for r in rows], dtype=np.int64),
            "attention_mask": mask,
        }
        if "token_type_ids" in self._named:
            numbers = [text_numbers(r, self.pair_mark) + [0] * (width - len(r)) for r in rows]
            feed["token_type_ids"] = np.array(numbers, dtype=np.int64)
        both = np.stack(self.session.run(["start_logits", "end_logits"], feed), 1).astype(np.float32, copy=False)
        return np.where(mask[:, None] == 1, both, np.float32(PADDING))

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 2, stop_ids: Sequence[int] = ()
    ) -> list[list[int]]:
        """The likeliest places of an answer's first and last token: for a golden case, two tokens of a vocabulary of places."""
        return self.logits(prompts, 2).argmax(-1).tolist()
