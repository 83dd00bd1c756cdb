"""The grid a shipped weight lies on: a torch twin of onnxruntime's MatMulNBits and GatherBlockQuantized.

A weight row is cut into blocks of `block` columns, the last one padded with zeros; a block has one scale and one unsigned zero
point, and a weight is `scale * (code - zero_point)` with codes in 0 … 2^bits - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from qft.targets import Target, Weights

# A block's range tries these factors on its lower and its upper end; (1, 1) is plain min/max. All sixteen pairs leave 5 %
# less error after GPTQ than eight factors on both ends alike, and six by six no less than these (SmolLM2, layer 10).
_FACTORS = (1.05, 1.0, 0.93, 0.86)


@dataclass(frozen=True)
class Scheme:
    """What a target asks of a matrix. symmetric: no zero points are stored, the middle code stands for zero.

    scale_type: float32 for processors, float16 for CUDA and the web's q4f16.
    """

    bits: int
    block: int
    symmetric: bool = False
    scale_type: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.bits} bits, {'symmetric ' if self.symmetric else ''}blocks of {self.block}"

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def stored_bytes(self, rows: int, cols: int) -> int:
        """Bytes that packed codes, scales and zero points (where they are stored) of a matrix take in a file."""
        blocks = -(-cols // self.block)
        zeros = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (blocks * self.block * self.bits // 8 + blocks * self.scale_type.itemsize + zeros)


@dataclass(frozen=True)
class Grids:
    """What a target stores its weights on. head: embedding and head; None: they stay float.

    finer: for those linear layers that `linear` would hurt most, as many as keep the mean over all linear layers within
    most_bits a weight; none: every linear layer is on `linear`.
    """

    linear: Scheme
    head: Scheme | None
    finer: tuple[Scheme, ...] = ()
    most_bits: float = math.inf


def grids_of(target: Target) -> Grids:
    """A profile's words as the quantizer takes them. The target must have a grid for its linear layers."""
    assert target.linear is not None

    def scheme(weights: Weights) -> Scheme:
        return Scheme(weights.bits, weights.block, weights.symmetric, getattr(torch, target.scale_type))

    head = scheme(target.head) if target.head is not None else None
    return Grids(scheme(target.linear), head, tuple(map(scheme, target.finer)), target.most_bits)


@dataclass(frozen=True)
class Quantized:
    """One matrix on a grid. codes: uint8 (rows, k_blocks, block); scales: scheme.scale_type and zero_points: uint8 (rows, k_blocks).

    Codes of padded columns are zero points, so they stand for zero. A symmetric matrix has zero points too, all the middle
    code; they are just not stored.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    cols: int
    scheme: Scheme

    def rows(self, some: slice) -> Quantized:
        """Some rows of the matrix, copied."""
        codes, scales, zeros = (t[some].clone() for t in (self.codes, self.scales, self.zero_points))
        return Quantized(codes, scales, zeros, self.cols, self.scheme)


def to_blocks(weight: Tensor, block: int) -> Tensor:
    """float (rows, cols) → float32 (rows, ceil(cols / block), block), the last block padded with zeros."""
    return in_blocks(weight.float(), block)


def in_blocks(weight: Tensor, block: int) -> Tensor:
    """As `to_blocks`, in the weight's own type, and in its memory where nothing is padded."""
    missing = -weight.shape[1] % block
    padded = torch.nn.functional.pad(weight, (0, missing)) if missing else weight
    return padded.reshape(len(weight), -1, block)


def quantize_nearest(weight: Tensor, scheme: Scheme) -> Quantized:
    """Round a matrix, float (rows, cols), to the nearest point of its grid."""
    blocks = to_blocks(weight, scheme.block)
    scales, zeros = find_scales(blocks, scheme)
    return Quantized(round_to(blocks, scales, zeros, scheme), scales, zeros, weight.shape[1], scheme)


def find_scales(blocks: Tensor, scheme: Scheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block, float32 (…, block): those whose codes have the least squared error.

    A block's range is its minimum to its maximum, always including zero, so that zero stays exactly zero; below 8 bits each
    block also tries narrower and wider ranges (as the clip search of AWQ, arXiv 2306.00978, on weights alone).
    importance: weight of each column's error, float32, broadcast to the blocks. Returns scale_type and uint8, both of shape (…).
    """
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for below, above in product(_FACTORS, _FACTORS) if scheme.bits < 8 else [(1.0, 1.0)]:  # at 8 bits it never paid
        scales, zeros = scale_and_zero(low * below, high * above, scheme)
        codes = _nearest(blocks, scales, zeros, scheme)
        error = codes.sub_(zeros[..., None]).mul_(scales[..., None].float()).sub_(blocks).square_()
        total = (error if importance is None else error * importance).sum(-1)
        if best is None:
            best = (scales, zeros, total)
        else:
            better = total < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip((scales, zeros, total), best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[0], best[1]


def round_to(blocks: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """uint8 (…, block): the nearest code of each value, float (…, block), on the grid of its block."""
    return _nearest(blocks, scales, zeros, scheme).to(torch.uint8)


def _nearest(blocks: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """As floats."""
    return (blocks / scales[..., None].float()).round_().add_(zeros[..., None]).clamp_(0, scheme.top)


def scale_and_zero(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Of blocks whose values lie between low ≤ 0 and high ≥ 0: scale_type and uint8, in their shape."""
    middle = (scheme.top + 1) // 2
    scales = torch.maximum(-low, high) / (middle - 1) if scheme.symmetric else (high - low) / scheme.top
    scales = scales.to(scheme.scale_type)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # an all-zero block: any scale gives zeros
    if scheme.symmetric:
        return scales, torch.full_like(scales, middle, dtype=torch.uint8)
    return scales, torch.round(-low / scales.float()).clamp_(0, scheme.top).to(torch.uint8)


def dequantize(matrix: Quantized) -> Tensor:
    """The float32 (rows, cols) matrix that the codes stand for."""
    blocks = (matrix.codes.float() - matrix.zero_points.float()[..., None]).mul_(matrix.scales.float()[..., None])
    return blocks.reshape(blocks.shape[0], -1)[:, : matrix.cols]


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 values below 2^bits → uint8, packed along the last axis, low nibble first; an odd length is padded with 0."""
    if bits == 8:
        return values.contiguous()
    even = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return (even[..., 0::2] | (even[..., 1::2] << 4)).contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`: uint8 (…, count)."""
    if bits == 8:
        return packed
    pairs = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :count]
