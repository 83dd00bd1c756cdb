"""An answer as it is written, token by token: read once, chosen, turned into whole characters, ended where asked. No torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from qft.bundle.feed import Feed
from qft.bundle.sampling import Sampler
from qft.data.tokenizer import TextTokenizer

_BROKEN = "\ufffd"  # what bytes decode to that are not yet a whole character


@dataclass(frozen=True)
class Answer:
    """A generated answer and whether the model ended it by itself."""

    text: str
    ended: bool
    tokens: int

    def __str__(self) -> str:
        return self.text


def tokens(
    feed: Feed, prompt: Sequence[int], sampler: Sampler, *, max_new_tokens: int, stop_ids: Sequence[int]
) -> Generator[int]:
    """At most max_new_tokens tokens; the last one is a stop token if one came."""
    ids = list(prompt)
    try:
        for left in reversed(range(max_new_tokens)):
            ids.append(sampler.choose(feed.after(ids), ids))
            if left and ids[-1] not in stop_ids:
                feed.expect(ids)
            yield ids[-1]
            if ids[-1] in stop_ids:
                return
    finally:
        feed.expect_nothing()


class Writing:
    """An answer's text, piece by piece: iterate, then ask. A piece may be empty: its characters are not whole, or not sure.

    text: what was given out so far. count: tokens. ended: by the model itself, or at one of the texts `stop`, which is left out.
    """

    def __init__(self, ids: Generator[int], tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self.text, self.count, self.ended = "", 0, False
        self._ids, self._tokenizer, self._stop = ids, tokenizer, [text for text in stop if text]
        self._written: list[int] = []
        self._begin = self._end = 0  # of the tokens that were decoded last: enough to see how the next ones join
        self._held = ""

    def __iter__(self) -> Iterator[str]:
        with closing(self._ids) as ids:
            for token in ids:
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


def side_by_side(feeds: Sequence[Feed], count: int, begin: Callable[[Feed, int], Writing]) -> Iterator[Answer]:
    """`count` answers, in their order. As many are in work as there are feeds, and take turns token by token.

    begin: an answer's writing, of its number; a feed is the one that was idle the shortest: what it has read is likely to fit.
    """
    idle, started, given = list(feeds), 0, 0
    working: dict[int, tuple[Feed, Writing, Iterator[str]]] = {}
    done: dict[int, Answer] = {}
    while given < count:
        while idle and started < count:
            feed = idle.pop()
            writing = begin(feed, started)
            working[started] = feed, writing, iter(writing)
            started += 1
        for number, (feed, writing, pieces) in list(working.items()):
            if next(pieces, None) is None:
                del working[number]
                idle.append(feed)
                done[number] = Answer(writing.text, writing.ended, writing.count)
        while given in done:
            yield done.pop(given)
            given += 1


def begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
