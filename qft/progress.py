"""How a room tells the command that draws how far it is; rooms never print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report of a slow loop: `done` of `total` `unit`s; `note` is short free text such as 'loss 0.41'."""

    what: str
    done: float
    total: float | None = None
    unit: str = ""
    note: str = ""


OnProgress = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """The default reporter: says nothing."""
