"""What a decoder has read of a growing text, and the next tokens of several texts read in one run. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from qft.bundle.cache import Cache
from qft.bundle.session import OnnxRunner

# Tokens: logits come for each of them, 1 MB for a vocabulary of 262,144. Gemma 270M's process held 1.4 GB reading 1,500
# tokens so, and 2.9 GB by 512, which one run on a busy machine did not show to be faster.
READ_AT_ONCE = 128
AT_ONCE = 4  # answers in work: each holds keys and values of all it has read


class Feed:
    """Logits after a growing row of tokens; what was read once is not read again."""

    def __init__(self, runner: OnnxRunner, batch: Batch | None = None) -> None:
        """batch: of the feeds that take turns with this one, on the same runner; None: there are no others."""
        self._runner, self._batch = runner, batch or Batch(runner)
        self._read: list[int] = []
        self._cache: Cache | None = None  # None as well while it is a row of the batch's
        self._said: np.ndarray | None = None  # after all that was read, if it was read in a batch

    def known(self, ids: Sequence[int]) -> int:
        """How many of `ids` need not be read again: those they begin with as what was read did, and never the last."""
        most = max(0, min(len(self._read), len(ids) - 1))
        read, asked = self._read[:most], list(ids[:most])
        if read == asked:  # as at every token that is written: lists are compared faster than their numbers one by one
            return most
        return next(place for place in range(most) if read[place] != asked[place])

    def expect(self, ids: Sequence[int]) -> None:
        """Say that logits after `ids` will be asked for; if they are what was read and one more token, a batch may read it."""
        if self._read and len(ids) == len(self._read) + 1 and self._read == list(ids[:-1]):
            self._batch.expect(self, ids[-1])

    def expect_nothing(self) -> None:
        """Nobody will ask."""
        self._batch.drop(self)

    def after(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (vocabulary,)."""
        self._batch.read_for(self)
        if self._said is not None and self._read == list(ids):
            return self._said
        *_, last = self.read(ids)
        return last

    def read(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Read part by part what is not known; float32 (vocabulary,) after each part."""
        self._batch.let_go(self)
        place, self._said = self.known(ids), None
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
        self._batch.let_go(self)
        self._read, self._cache, self._said = [], None, None

    def lend(self) -> Cache:
        """What was read, to be a batch's row."""
        assert self._cache is not None
        cache, self._cache = self._cache, None
        return cache

    def take_back(self, cache: Cache) -> None:
        """What was lent, grown."""
        self._cache = cache

    def was_read(self, token: int, logits: np.ndarray) -> None:
        """A batch has read one more token. logits: float32 (vocabulary,)."""
        self._read.append(token)
        self._said = logits


class Batch:
    """The next tokens of several feeds, read in one run as soon as the first of them is asked for: the weights go through the
    processor once for all rows.

    Rows stay together, with keys and values in one buffer, as long as the same feeds go on; one that comes or goes has the others
    copied.
    """

    def __init__(self, runner: OnnxRunner) -> None:
        self._runner = runner
        self._next: dict[Feed, int] = {}
        self._rows: list[Feed] = []
        self._cache: Cache | None = None

    def expect(self, feed: Feed, token: int) -> None:
        """A feed's next token."""
        self._next[feed] = token

    def drop(self, feed: Feed) -> None:
        """A feed's next token is not wanted."""
        self._next.pop(feed, None)

    def read_for(self, feed: Feed) -> None:
        """Read what is expected, if that is this feed's and another's."""
        if feed not in self._next:
            return
        wanted, self._next = self._next, {}
        if len(wanted) == 1:  # the feed reads by itself
            return
        feeds = sorted(wanted, key=lambda one: self._rows.index(one) if one in self._rows else len(self._rows))
        if self._cache is None or feeds != self._rows:
            self._part()
            self._cache, self._rows = Cache.joined([one.lend() for one in feeds]), feeds
        logits, self._cache = self._runner.step([wanted[one] for one in feeds], self._cache)
        for one, said in zip(feeds, logits, strict=True):
            one.was_read(wanted[one], said[-1])

    def let_go(self, feed: Feed) -> None:
        """Nothing more is read for a feed, and what was is its own again."""
        self.drop(feed)
        if feed in self._rows:
            self._part()

    def _part(self) -> None:
        if self._cache is not None:
            for feed, own in zip(self._rows, self._runner.rows(self._cache), strict=True):
                feed.take_back(own)
        self._cache, self._rows = None, []
