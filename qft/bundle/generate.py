"""An answer as it is written, token by token: read once, chosen, turned into whole characters, ended where asked. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qft.bundle.cache import Cache
from qft.bundle.sampling import Sampler
from qft.bundle.session import OnnxRunner
from qft.data.tokenizer import TextTokenizer

_BROKEN = "\ufffd"  # what bytes decode to that are not yet a whole character
# Tokens: logits come for each of them, 1 MB for a vocabulary of 262,144. Gemma 270M's process held 1.4 GB reading 1,500
# tokens so, and 2.9 GB by 512, which one run on a busy machine did not show to be faster.
READ_AT_ONCE = 128


@dataclass(frozen=True)
class Answer:
    """A generated answer and whether the model ended it by itself."""

    text: str
    ended: bool
    tokens: int

    def __str__(self) -> str:
        return self.text


class Feed:
    """Logits after a growing row of tokens; what was read once is not read again."""

    def __init__(self, runner: OnnxRunner) -> None:
        self._runner = runner
        self._read: list[int] = []
        self._cache: Cache | None = None

    def known(self, ids: Sequence[int]) -> int:
        """How many of `ids` need not be read again: those they begin with as what was read did, and never the last."""
        most = max(0, min(len(self._read), len(ids) - 1))
        read, asked = self._read[:most], list(ids[:most])
        if read == asked:  # as at every token that is written: lists are compared faster than their numbers one by one
            return most
        return next(place for place in range(most) if read[place] != asked[place])

    def after(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (vocabulary,)."""
        *_, last = self.read(ids)
        return last

    def read(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Read part by part what is not known; float32 (vocabulary,) after each part."""
        place = self.known(ids)
        if place == 0:
            self.forget()
        elif self._cache is not None and place < self._cache.length:
            self._read, self._cache = self._read[:place], self._cache.cut(place)
        while place < len(ids):
            part = list(ids[place : place + READ_AT_ONCE])
            if self._cache is None:
                logits, cache = self._runner.prefill([part])
            else:
                logits, cache = self._runner.extend([part], self._cache)
            place += len(part)
            self._read, self._cache = list(ids[:place]), cache  # at once: an interrupt comes before both or after
            yield logits[0, -1]

    def forget(self) -> None:
        """Let go of what was read."""
        self._read, self._cache = [], None


def tokens(
    feed: Feed, prompt: Sequence[int], sampler: Sampler, *, max_new_tokens: int, stop_ids: Sequence[int]
) -> Iterator[int]:
    """At most max_new_tokens tokens; the last one is a stop token if one came."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(sampler.choose(feed.after(ids), ids))
        yield ids[-1]
        if ids[-1] in stop_ids:
            return


class Writing:
    """An answer's text, piece by piece: iterate, then ask. A piece may be empty: its characters are not whole, or not sure.

    text: what was given out so far. count: tokens. ended: by the model itself, or at one of the texts `stop`, which is left out.
    """

    def __init__(self, ids: Iterator[int], tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self.text, self.count, self.ended = "", 0, False
        self._ids, self._tokenizer, self._stop = ids, tokenizer, [text for text in stop if text]
        self._written: list[int] = []
        self._begin = self._end = 0  # of the tokens that were decoded last: enough to see how the next ones join
        self._held = ""

    def __iter__(self) -> Iterator[str]:
        for token in self._ids:
            self.count += 1
            if token in self._tokenizer.stop_ids:
                self.ended = True
                break
            self._written.append(token)
            yield self._given_out(self._decoded())
            if self.ended:
                return
        rest = self._tokenizer.decode(self._written[self._begin :])[len(self._before()) :]
        yield self._given_out(rest, last=True)

    def _before(self) -> str:
        return self._tokenizer.decode(self._written[self._begin : self._end])

    def _decoded(self) -> str:
        """What the tokens since the last whole character say; nothing while that is not whole."""
        before, whole = self._before(), self._tokenizer.decode(self._written[self._begin :])
        if whole.endswith(_BROKEN) or len(whole) <= len(before):
            return ""
        self._begin, self._end = self._end, len(self._written)
        return whole[len(before) :]

    def _given_out(self, more: str, *, last: bool = False) -> str:
        """The text before a stop text; what may be the beginning of one waits."""
        text = self._held + more
        if places := [place for stop in self._stop if (place := text.find(stop)) >= 0]:
            piece, self._held, self.ended = text[: min(places)], "", True
        else:
            sure = len(text) - (0 if last else max((begun(text, stop) for stop in self._stop), default=0))
            piece, self._held = text[:sure], text[sure:]
        self.text += piece
        return piece


def begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
