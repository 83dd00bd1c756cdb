"""One thread asks the model; answers take turns on it, so that a long one holds up none, and no more wait than are let in."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any


class Full(Exception):
    """As many answers wait as may."""


class Stopped(Exception):
    """The server is stopping."""


_END = object()


class Ticket:
    """One answer in work: what its steps give comes through `events`. To be used on the event loop that took it."""

    def __init__(self, steps: Iterator[Any]) -> None:
        self.steps = steps
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, event: Any) -> None:
        """From the thread that does the steps; an exception is raised where events are read."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended: nobody reads
            self.cancelled = True

    async def events(self) -> AsyncIterator[Any]:
        """What the steps give, as it comes."""
        while (event := await self._events.get()) is not _END:
            if isinstance(event, BaseException):
                raise event if isinstance(event, Exception) else RuntimeError(str(event)) from event
            yield event

    def cancel(self) -> None:
        """Nobody wants the rest: the answer stops after the step it is in."""
        self.cancelled = True


class Turns:
    """At most `at_once` answers are in work, one step each in turn; at most `waiting` wait, and are let in as they came."""

    def __init__(self, *, at_once: int, waiting: int) -> None:
        self.at_once, self.most_waiting = at_once, waiting
        self._changed = threading.Condition()
        self._working: deque[Ticket] = deque()
        self._waiting: deque[Ticket] = deque()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="qft-answers", daemon=True)
        self._thread.start()

    @property
    def working(self) -> int:
        """Answers in work."""
        return len(self._working)

    @property
    def waiting(self) -> int:
        """Answers that wait."""
        return len(self._waiting)

    def take(self, steps: Iterator[Any]) -> Ticket:
        """Let an answer in. Raises Full, or Stopped."""
        with self._changed:
            if self._stopped:
                raise Stopped
            for given_up in [one for one in self._waiting if one.cancelled]:
                self._waiting.remove(given_up)
                given_up.put(Stopped())
            if len(self._working) + len(self._waiting) >= self.at_once + self.most_waiting:
                raise Full
            ticket = Ticket(steps)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def stop(self) -> None:
        """End every answer after the step it is in."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting and len(self._working) < self.at_once:
                    self._working.append(self._waiting.popleft())
                if not self._working:
                    if self._stopped:
                        return
                    self._changed.wait()
                    continue
                ticket = self._working.popleft()
                self._working.append(ticket)
            event, more = self._step(ticket)
            if not more:  # its place is free before it is told so, and asks again
                with self._changed:
                    self._working.remove(ticket)
            ticket.put(event)

    def _step(self, ticket: Ticket) -> tuple[Any, bool]:
        """What the next step gives, and whether there is more to do."""
        try:
            if ticket.cancelled or self._stopped:
                ticket.steps.close()  # type: ignore[attr-defined]
                raise Stopped
            return next(ticket.steps), True
        except StopIteration:
            return _END, False
        except BaseException as error:  # a panic of llguidance is no Exception: the other answers go on
            return error, False
