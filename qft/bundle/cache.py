"""What a decoder remembers of the tokens it has read: keys and values of every layer, by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

_LEAST_ROOM = 128  # places that are free when a buffer is made, or a quarter of those that are not


@dataclass
class Past:
    """values: by the name of their input, (rows, heads, places, size). used: places that are written, by whoever reads on.

    binding: where they are a session's past and present at once, so that a step binds only what is new.
    """

    values: dict[str, ort.OrtValue]
    used: int
    binding: ort.IOBinding | None = None

    def changed(self, change: Callable[[np.ndarray], np.ndarray], used: int) -> Past:
        """A copy, each array changed."""
        arrays = {name: np.ascontiguousarray(change(value.numpy())) for name, value in self.values.items()}
        return Past({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}, used)

    def with_room(self, length: int, total: int) -> Past:
        """For a row of `length` tokens that grows to `total`: this one, or a longer copy if there is no room.

        A copy as well if somebody else has read on from the same tokens: what they wrote there stays theirs.
        """
        if self.used == length and next(iter(self.values.values())).shape()[2] >= total:
            return self
        places = total + max(_LEAST_ROOM, total // 4)
        return self.changed(lambda value: _filled_up(value[:, :, :length], places), length)


@dataclass
class Cache:
    """What a prefill leaves behind. mask: int64 (rows, places); positions: the next one of each row."""

    past: Past
    mask: np.ndarray
    positions: np.ndarray

    @property
    def length(self) -> int:
        """Places of the longest row."""
        return self.mask.shape[1]

    def repeated(self, count: int) -> Cache:
        """That of one row, for `count` rows that go on from it."""
        length = self.length
        past = self.past.changed(lambda value: np.repeat(value[:, :, :length], count, axis=0), length)
        return Cache(past, *(np.repeat(part, count, axis=0) for part in (self.mask, self.positions)))

    def cut(self, length: int) -> Cache:
        """The first tokens of one row alone."""
        past = self.past.changed(lambda value: value[:, :, :length], length)
        return Cache(past, self.mask[:, :length], self.positions - (self.length - length))

    def rows(self, *, at_front: bool) -> list[Cache]:
        """Each row's own, without what it was filled up with. at_front: whether its tokens are at the first places, as fused
        attention keeps them, wherever the mask shows them.
        """
        arrays = {name: value.numpy() for name, value in self.past.values.items()}
        found = []
        for row, mask in enumerate(self.mask):
            own = np.flatnonzero(mask)
            kept = slice(len(own)) if at_front else own
            part = {name: np.ascontiguousarray(array[row : row + 1, :, kept]) for name, array in arrays.items()}
            values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in part.items()}
            places = np.ones((1, len(own)), np.int64)
            found.append(Cache(Past(values, len(own)), places, self.positions[row : row + 1]))
        return found

    @staticmethod
    def joined(rows: Sequence[Cache]) -> Cache:
        """Rows of any length as one batch; shorter ones are filled up behind, with places that are not attended to."""
        places = max(row.length for row in rows)
        arrays = {
            name: np.concatenate(
                [_filled_up(row.past.values[name].numpy()[:, :, : row.length], places) for row in rows]
            )
            for name in rows[0].past.values
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        mask = np.concatenate([np.pad(row.mask, ((0, 0), (0, places - row.length))) for row in rows])
        return Cache(Past(values, places), mask, np.concatenate([row.positions for row in rows]))


def _filled_up(value: np.ndarray, places: int) -> np.ndarray:
    longer = np.zeros((*value.shape[:2], places, value.shape[3]), value.dtype)
    longer[:, :, : value.shape[2]] = value
    return longer
