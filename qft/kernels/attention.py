"""Causal attention over rows that lie end to end: no row sees another, and short ones go through together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from qft.kernels.norm import widened

_QUERIES = 256  # of a row at once: what they may not see is not computed
_SCORES = 2**16  # of a head at once: they stay within the cache
_LEAST = 32  # queries or keys


@dataclass(frozen=True)
class Block:
    """Queries that go through together, as many of each of some rows, and the keys that they may see.

    queries, keys: which tokens, rows one after another. Rows are filled up with copies of the first token, so that there are few
    sizes: a product of a new size in 16 bits takes 0.6 MB that oneDNN keeps. mask: (rows, 1, queries, 1, keys), 0 or -inf.
    real: which of the queries are none, and the tokens that these are; None if all of them are.
    """

    rows: int
    queries: Tensor | slice
    keys: Tensor | slice
    mask: Tensor
    real: tuple[Tensor, Tensor] | None


class _Piece(NamedTuple):
    """Some queries of a row. tokens: where they and their keys lie; places: where in the row."""

    query_tokens: Tensor
    key_tokens: Tensor
    query_places: Tensor
    key_places: Tensor


@dataclass(frozen=True)
class Pack:
    """Where rows lie among the tokens. prefix: tokens at the very beginning that every row goes on from.

    lengths: of the prefix, if there is one, then of the rows without it. made: blocks, as they are asked for.
    """

    lengths: Sequence[int]
    prefix: int = 0
    made: dict[tuple[int | None, torch.dtype], list[Block]] = field(default_factory=dict, compare=False)

    def positions(self) -> Tensor:
        """int64 (tokens,): each token's place in its own row."""
        return torch.cat([torch.arange(n) + (self.prefix if start else 0) for start, n in self._rows()])

    def blocks(self, window: int | None, like: Tensor) -> list[Block]:
        """All queries. window: keys a query sees, itself counted; None: all before it. like: of the masks' type and device."""
        key = (window, like.dtype)
        if key not in self.made:
            sizes: dict[tuple[int, int], list[_Piece]] = {}
            for piece in self._pieces(window):
                sizes.setdefault((_size(len(piece.query_tokens)), _size(len(piece.key_tokens))), []).append(piece)
            self.made[key] = [
                _block(some, *size, window, like)
                for size, pieces in sizes.items()
                for some in _runs(pieces, _SCORES // (size[0] * size[1]))
            ]
        return self.made[key]

    def _pieces(self, window: int | None) -> Iterator[_Piece]:
        for start, length in self._rows():
            before = self.prefix if start else 0
            for first in range(0, length, _QUERIES):
                last = min(first + _QUERIES, length)
                # Places count from the row's beginning, the prefix included; keys before `low` are out of every query's sight.
                low = 0 if window is None else max(0, before + first - window + 1)
                places, keys = torch.arange(before + first, before + last), torch.arange(low, before + last)
                yield _Piece(
                    torch.arange(start + first, start + last), torch.where(keys < before, keys, keys - before + start),
                    places, keys,
                )  # fmt: skip

    def _rows(self) -> Iterator[tuple[int, int]]:
        start = 0
        for length in self.lengths:
            yield start, length
            start += length


def _size(count: int) -> int:
    """A power of two up to 256, then whole 256s with one of these after them."""
    rest = count % _QUERIES
    return count - rest + (max(_LEAST, 1 << (rest - 1).bit_length()) if rest else 0)


def _runs(pieces: list[_Piece], most: int) -> Iterator[list[_Piece]]:
    """As many at once as a power of two says."""
    start, count = 0, 1 << max(0, most.bit_length() - 1)
    while start < len(pieces):
        while count > len(pieces) - start:
            count //= 2
        yield pieces[start : start + count]
        start += count


def _block(pieces: list[_Piece], queries: int, keys: int, window: int | None, like: Tensor) -> Block:
    def filled(parts: list[Tensor], width: int, value: int) -> Tensor:
        """(rows, width)."""
        return torch.stack([torch.nn.functional.pad(part, (0, width - len(part)), value=value) for part in parts])

    # Copies see all that is a key, so that their probabilities are numbers, and no one sees a copy.
    asks = filled([p.query_places for p in pieces], queries, -1)[:, :, None]
    seen = filled([p.key_places for p in pieces], keys, -1)[:, None]
    distance = asks - seen
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    hidden = (hidden & (asks >= 0)) | (seen < 0)
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    mask.masked_fill_(hidden.to(like.device), -torch.inf)
    query_tokens, key_tokens = (
        filled(parts, width, 0).flatten()
        for parts, width in (([p.query_tokens for p in pieces], queries), ([p.key_tokens for p in pieces], keys))
    )
    places = (asks.flatten() >= 0).nonzero()[:, 0]
    real = None if len(places) == len(query_tokens) else (places.to(like.device), query_tokens[places].to(like.device))
    return Block(len(pieces), _tokens(query_tokens, like), _tokens(key_tokens, like), mask[:, None, :, None], real)


def _tokens(which: Tensor, like: Tensor) -> Tensor | slice:
    """As a slice if they follow each other, which takes no copy."""
    first, count = int(which[0]), len(which)
    follow = torch.equal(which, torch.arange(first, first + count))
    return slice(first, first + count) if follow else which.to(like.device)


@dataclass(frozen=True)
class Attention:
    """Scaled dot products; `groups` query heads share a key and value head. window: keys a query sees, itself counted; None: all."""

    scale: float
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        """q: (tokens, heads, width), k, v: (tokens, key heads, width) → like q."""
        out = torch.empty_like(q)
        for block in pack.blocks(self.window, q):
            p = self._probabilities(_by_head(q[block.queries], block, k.shape[1]), _keys(k, block), block)
            _put(out, block, p @ _keys(v, block))
        return out

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v. The probabilities are formed again, so that none is kept (arXiv 2205.14135)."""
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(widened(k)), torch.zeros_like(widened(v))
        for block in pack.blocks(self.window, q):
            some_q, some_k, some_v = _by_head(q[block.queries], block, k.shape[1]), _keys(k, block), _keys(v, block)
            grad = _by_head(_upstream(dout, block), block, k.shape[1])
            p = self._probabilities(some_q, some_k, block)
            _give(dv, block, p.transpose(1, 2) @ grad)
            ds = torch.ops.aten._softmax_backward_data(grad @ some_v.transpose(1, 2), p, -1, p.dtype)
            _put(dq, block, (ds @ some_k).mul_(self.scale))
            _give(dk, block, (ds.transpose(1, 2) @ some_q).mul_(self.scale))
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _probabilities(self, q: Tensor, k: Tensor, block: Block) -> Tensor:
        """(rows · key heads, queries · groups, keys)."""
        scores = (q * self.scale) @ k.transpose(1, 2)
        rows, queries, keys = block.rows, block.mask.shape[2], block.mask.shape[4]
        by_query = scores.view(rows, -1, queries, scores.shape[1] // queries, keys)
        by_query += block.mask
        return torch.softmax(scores, -1)


def _by_head(some: Tensor, block: Block, key_heads: int) -> Tensor:
    """Of a block's queries, (rows · queries, heads, width) → (rows · key heads, queries · groups, width)."""
    queries, width = len(some) // block.rows, some.shape[-1]
    by_row = some.view(block.rows, queries, key_heads, -1, width).transpose(1, 2)
    return by_row.reshape(block.rows * key_heads, -1, width)


def _upstream(dout: Tensor, block: Block) -> Tensor:
    """(rows · queries, heads, width): of copies zero."""
    if block.real is None:
        return dout[block.queries]
    places, tokens = block.real
    found = dout.new_zeros(block.rows * block.mask.shape[2], *dout.shape[1:])
    found[places] = dout[tokens]
    return found


def _keys(x: Tensor, block: Block) -> Tensor:
    """(tokens, key heads, width) → (rows · key heads, keys, width)."""
    some = x[block.keys]
    return some.view(block.rows, -1, *some.shape[1:]).transpose(1, 2).flatten(0, 1)


def _put(total: Tensor, block: Block, found: Tensor) -> None:
    """Undo `_by_head`, and write it where `block.queries` took it from."""
    queries, (_, heads, width) = block.mask.shape[2], total.shape
    by_row = found.view(block.rows, -1, queries, found.shape[1] // queries, width).transpose(1, 2)
    flat = by_row.reshape(-1, heads, width)
    if block.real is None:
        total[block.queries] = flat
    else:
        places, tokens = block.real
        total[tokens] = flat[places]


def _give(total: Tensor, block: Block, found: Tensor) -> None:
    """Add (rows · key heads, keys, width) where `_keys` took from."""
    by_row = found.view(block.rows, -1, *found.shape[1:]).transpose(1, 2).flatten(0, 1)
    if isinstance(block.keys, slice):
        total[block.keys] += by_row
    else:
        total.index_add_(0, block.keys, by_row.to(total.dtype))
