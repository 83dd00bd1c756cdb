"""Held-out rows by a hash of their text or group, so that equal texts and one group's rows never lie on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qft.data.examples import Example
from qft.errors import InputError


def drop_duplicates(examples: Sequence[Example]) -> tuple[list[Example], int, int]:
    """Keep the first of rows with equal prompt and answer. Returns (kept, duplicates dropped, contradictions kept).

    A contradiction is a prompt that was seen before with another answer.
    """
    seen: dict[str, set[str]] = {}
    kept: list[Example] = []
    conflicts = 0
    for example in examples:
        answers = seen.setdefault(example.key(), set())
        if example.answer() in answers:
            continue
        conflicts += bool(answers)
        answers.add(example.answer())
        kept.append(example)
    return kept, len(examples) - len(kept), conflicts


def split_by_hash(
    examples: Sequence[Example], parts: Mapping[str, float | int], *, seed: int
) -> dict[str, list[Example]]:
    """Cut off `parts` (a fraction below 1, or a number of rows); the rest is "train". Order within a part is kept.

    A row's place is SHA-256(seed, text or group), so adding rows moves few others; a group is larger than a row, and the last one
    taken may make a part larger than asked for. Raises InputError if a part would be empty.
    """
    draws = {unit: _draw(unit, seed) for unit in {e.unit() for e in examples}}
    order = sorted(draws, key=draws.__getitem__)
    rows_of: dict[str, int] = {}
    for example in examples:
        rows_of[example.unit()] = rows_of.get(example.unit(), 0) + 1
    owner: dict[str, str] = {}
    position = 0
    for part, size in parts.items():
        wanted = round(size * len(examples)) if size < 1 else int(size)
        taken = 0
        while taken < wanted and position < len(order):
            owner[order[position]] = part
            taken += rows_of[order[position]]
            position += 1
    result: dict[str, list[Example]] = {part: [] for part in (*parts, "train")}
    for example in examples:
        result[owner.get(example.unit(), "train")].append(example)
    for part, rows in result.items():
        if not rows:
            raise InputError(
                f"the split leaves nothing for {part}: {len(examples)} rows in all, "
                + ", ".join(f"data.{p} = {s}" for p, s in parts.items()),
                where=f"data.{part}",
                hint="ask for fewer held-out rows, or give more rows",
            )
    return result


def take_by_hash(examples: Sequence[Example], count: int, *, seed: int) -> list[Example]:
    """At most `count` rows, chosen by hash, in their order."""
    if len(examples) <= count:
        return list(examples)
    chosen = sorted(range(len(examples)), key=lambda i: (_draw(examples[i].key(), seed + 1), i))[:count]
    return [examples[i] for i in sorted(chosen)]


@dataclass(frozen=True)
class Leaks:
    """Texts on both sides. train: training rows that were left out for it; held_out: held-out rows, which stay."""

    train: int
    held_out: int

    def __add__(self, other: Leaks) -> Leaks:
        return Leaks(self.train + other.train, self.held_out + other.held_out)


def without_leaks(train: Sequence[Example], held_out: Sequence[Example]) -> tuple[list[Example], Leaks]:
    """Training rows whose text and group are not held out, and how many rows of either side had those of the other."""
    known, learnt = (_known(side) for side in (held_out, train))
    kept = [e for e in train if known.isdisjoint((e.key(), e.unit()))]
    return kept, Leaks(len(train) - len(kept), sum(not learnt.isdisjoint((e.key(), e.unit())) for e in held_out))


def _known(examples: Sequence[Example]) -> set[str]:
    return {known for e in examples for known in (e.key(), e.unit())}


def _draw(key: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "big") / 2**64
