"""The grid a shipped weight lies on: a torch twin of onnxruntime's MatMulNBits and GatherBlockQuantized.

A weight row is cut into blocks of `block` columns, the last one padded with zeros; a block has one float32 scale and one
unsigned zero point, and a weight is `scale * (code - zero_point)` with codes in 0 … 2^bits - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Candidates for shrinking a block's range; 1.0 is plain min/max. Found by a scan from 0.5 in steps of 0.04: below 0.7 no
# block of the tested models ever chose one.
_SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.80, 0.75, 0.70)


@dataclass(frozen=True)
class Quantized:
    """One matrix on a grid. codes: uint8 (rows, k_blocks, block); scales: float32 and zero_points: uint8 (rows, k_blocks)."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    cols: int
    bits: int

    @property
    def block(self) -> int:
        """Columns of one block."""
        return self.codes.shape[2]


def to_blocks(weight: Tensor, block: int) -> Tensor:
    """float (rows, cols) → float32 (rows, ceil(cols / block), block), the last block padded with zeros."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % block))
    return padded.reshape(rows, -1, block)


def quantize_nearest(weight: Tensor, *, bits: int, block: int) -> Quantized:
    """Round a matrix to the nearest point of its grid.

    weight: float (rows, cols). A block's range is its minimum to its maximum, always including zero, so that zero stays
    exactly zero; at 4 bits each block also tries shrunken ranges and keeps the one with the least squared error (the clip
    search of AWQ, arXiv 2306.00978, on weights alone).
    """
    blocks = to_blocks(weight, block)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for shrink in _SHRINK if bits < 8 else _SHRINK[:1]:  # at 8 bits clipping never paid
        scales, zeros = _scale_and_zero(low * shrink, high * shrink, bits)
        codes = (torch.round(blocks / scales[..., None]) + zeros[..., None]).clamp_(0, 2**bits - 1)
        error = ((codes - zeros[..., None]) * scales[..., None] - blocks).square_().sum(-1)
        if best is None:
            best = (codes.to(torch.uint8), scales, zeros, error)
        else:
            better = error < best[3]
            best = (
                torch.where(better[..., None], codes.to(torch.uint8), best[0]),
                torch.where(better, scales, best[1]),
                torch.where(better, zeros, best[2]),
                torch.where(better, error, best[3]),
            )
    assert best is not None
    return Quantized(best[0], best[1], best[2].to(torch.uint8), weight.shape[1], bits)


def _scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    scales = (high - low) / top
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # an all-zero block: any scale gives zeros
    return scales, torch.round(-low / scales).clamp_(0, top)


def dequantize(matrix: Quantized) -> Tensor:
    """The float32 (rows, cols) matrix that the codes stand for."""
    blocks = (matrix.codes.float() - matrix.zero_points.float()[..., None]) * matrix.scales[..., None]
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


def stored_bytes(matrix: Quantized) -> int:
    """Bytes the packed codes, scales and zero points take in a file."""
    return sum(
        t.numel() * t.element_size()
        for t in (pack(matrix.codes, matrix.bits), matrix.scales, pack(matrix.zero_points, matrix.bits))
    )
