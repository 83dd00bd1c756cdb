"""Codes, scales and zero points against a float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qft.quant.grids import dequantize, pack, quantize_nearest, stored_bytes, unpack
from qft.quant.linear import Grid


@given(rows=st.integers(1, 5), cols=st.integers(1, 70), bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_rounding_is_as_good_as_a_float64_reference(rows: int, cols: int, bits: int, seed: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    matrix = quantize_nearest(weight, bits=bits, block=32)
    error = (dequantize(matrix).double() - weight.double()).abs()
    plain = np.abs(quantize_plain(weight.double().numpy(), bits) - weight.double().numpy())
    # A zero point that lies between two codes may round the other way in float32: half a step for a whole block.
    steps = matrix.scales.double().repeat_interleave(32, 1)[:, :cols]
    if bits == 8:
        assert (error <= 1.01 * steps).all()
        assert error.square().sum() <= 4 * np.square(plain).sum() + steps.square().sum() / 12
    else:  # each block tries clipped ranges and keeps the best, so it is seldom worse and mostly better
        assert error.square().sum() <= 1.25 * np.square(plain).sum() + 1e-9


def quantize_plain(weight: np.ndarray, bits: int, block: int = 32) -> np.ndarray:
    """Min-max rounding in float64, written out block by block."""
    out = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            part = weight[row, start : start + block]
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = (high - low) / (2**bits - 1) or 1.0
            zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
            out[row, start : start + block] = (np.clip(np.round(part / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return out


@given(count=st.integers(1, 33), seed=st.integers(0, 99))
def test_packing_is_undone_by_unpacking(count: int, seed: int) -> None:
    values = torch.randint(0, 16, (3, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(unpack(pack(values, 4), 4, count), values)
    assert pack(values, 4)[0, 0] == values[0, 0] | ((values[0, 1] if count > 1 else 0) << 4)  # low nibble first


def test_zero_stays_exactly_zero() -> None:
    weight = torch.randn(8, 64) + 3
    weight[:, ::7] = 0
    assert (dequantize(quantize_nearest(weight, bits=4, block=32))[:, ::7] == 0).all()


def test_a_weight_on_its_grid_finds_its_code_again_after_bfloat16() -> None:
    torch.manual_seed(1)
    weight = torch.randn(64, 200)
    grid = Grid.of(weight, bits=4, block=32)
    rounded = grid.rounded(weight)
    assert torch.equal(grid.codes(rounded), grid.codes(weight))
    assert torch.equal(grid.codes(rounded.bfloat16().float()), grid.codes(weight))


def test_rounding_equals_dequantized_codes() -> None:
    torch.manual_seed(2)
    weight = torch.randn(16, 100)
    matrix = quantize_nearest(weight, bits=4, block=32)
    grid = Grid(matrix.scales, matrix.zero_points, 4, 32)
    torch.testing.assert_close(grid.rounded(weight), dequantize(matrix), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("bits", "expected"), [(4, 64 * 128 // 2 + 64 * 4 * 4 + 64 * 2), (8, 64 * 128 + 64 * 4 * 4 + 64 * 4)]
)
def test_stored_bytes_count_codes_scales_and_zero_points(bits: int, expected: int) -> None:
    assert stored_bytes(quantize_nearest(torch.randn(64, 128), bits=bits, block=32)) == expected
