"""Causal attention over rows that lie end to end: no padding, and no row sees another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qft.kernels.norm import widened

_BLOCK = 256  # queries at once: what they may not see is not computed, and scores stay within the cache


@dataclass(frozen=True)
class Pack:
    """Where rows lie among the tokens. prefix: tokens at the very beginning that every row goes on from.

    lengths: of the prefix, if there is one, then of the rows without it. masks: made as they are asked for.
    """

    lengths: Sequence[int]
    prefix: int = 0
    masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict, compare=False)

    def positions(self) -> Tensor:
        """int64 (tokens,): each token's place in its own row."""
        return torch.cat([torch.arange(n) + (self.prefix if start else 0) for start, n in self._rows()])

    def blocks(self, window: int | None) -> Iterator[tuple[slice, list[slice], int]]:
        """Queries that go together, the keys that any of them may see (the prefix's, the row's own), and how many of these keys
        stand before the first query: what `mask` is asked with.
        """
        for start, length in self._rows():
            before = self.prefix if start else 0
            for first in range(0, length, _BLOCK):
                last = min(first + _BLOCK, length)
                # Places count from the row's beginning, the prefix included; keys before `low` are out of every query's sight.
                low = 0 if window is None else max(0, before + first - window + 1)
                keys = [slice(low, before)] if low < before else []
                keys.append(slice(start + max(0, low - before), start + last))
                yield slice(start + first, start + last), keys, before + first - low

    def mask(self, queries: int, ahead: int, window: int | None, like: Tensor) -> Tensor:
        """(queries, 1, ahead + queries), 0 or -inf: a query sees itself, what is before it, and no more than `window` of these."""
        key = (queries, ahead, window, like.dtype)
        if key not in self.masks:
            distance = torch.arange(queries)[:, None] + ahead - torch.arange(ahead + queries)
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            self.masks[key] = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)[:, None]
        return self.masks[key].to(like.device)

    def _rows(self) -> Iterator[tuple[int, int]]:
        start = 0
        for length in self.lengths:
            yield start, length
            start += length


@dataclass(frozen=True)
class Attention:
    """Scaled dot products; `groups` query heads share a key and value head. window: keys a query sees, itself counted; None: all."""

    scale: float
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        """q: (tokens, heads, width), k, v: (tokens, key heads, width) → like q."""
        out = torch.empty_like(q)
        for queries, keys, ahead in pack.blocks(self.window):
            p = self._probabilities(q[queries], _take(k, keys), pack, ahead)
            out[queries] = _ungrouped(p @ _take(v, keys), q.shape[1])
        return out

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v. The probabilities are formed again, so that none is kept (arXiv 2205.14135)."""
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(widened(k)), torch.zeros_like(widened(v))
        for queries, keys, ahead in pack.blocks(self.window):
            some_k, some_v = _take(k, keys), _take(v, keys)
            some_q, grad = _grouped(q[queries], k.shape[1]), _grouped(dout[queries], k.shape[1])
            p = self._probabilities(q[queries], some_k, pack, ahead)
            _give(dv, keys, p.transpose(1, 2) @ grad)
            ds = torch.ops.aten._softmax_backward_data(grad @ some_v.transpose(1, 2), p, -1, p.dtype)
            dq[queries] = _ungrouped(ds @ some_k, q.shape[1]).mul_(self.scale)
            _give(dk, keys, (ds.transpose(1, 2) @ some_q).mul_(self.scale))
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _probabilities(self, q: Tensor, k: Tensor, pack: Pack, ahead: int) -> Tensor:
        """(key heads, queries · groups, keys)."""
        scores = (_grouped(q, k.shape[0]) * self.scale) @ k.transpose(1, 2)
        by_query = scores.view(len(k), len(q), -1, k.shape[1])
        by_query += pack.mask(len(q), ahead, self.window, scores)
        return torch.softmax(scores, -1)


def _grouped(q: Tensor, key_heads: int) -> Tensor:
    """(queries, heads, width) → (key heads, queries · groups, width)."""
    return q.view(len(q), key_heads, -1, q.shape[-1]).transpose(0, 1).reshape(key_heads, -1, q.shape[-1])


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """The way back."""
    groups = heads // len(x)
    return x.view(len(x), -1, groups, x.shape[-1]).transpose(0, 1).reshape(-1, heads, x.shape[-1])


def _take(x: Tensor, keys: list[slice]) -> Tensor:
    """(tokens, key heads, width) → (key heads, keys, width)."""
    parts = [x[span] for span in keys]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _give(total: Tensor, keys: list[slice], found: Tensor) -> None:
    """Add (key heads, keys, width) where `_take` took from."""
    start = 0
    for span in keys:
        count = span.stop - span.start
        total[span] += found[:, start : start + count].transpose(0, 1)
        start += count
