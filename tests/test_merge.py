"""Which base an adapter is merged into."""

from __future__ import annotations

import numpy as np
import pytest

from qft.stages.merge import choose
from qft.training.forward import Validation


def measured(nats: np.ndarray) -> Validation:
    return Validation(float(nats.mean()), 0.0, nats.tolist())


@pytest.mark.parametrize(
    ("gain", "way"), [(0.3, "16-bit base"), (0.01, "dequantized 4-bit base"), (-0.3, "dequantized 4-bit base")]
)
def test_the_16_bit_base_must_be_better_beyond_chance(gain: float, way: str) -> None:
    chance = np.random.default_rng(0)
    rounded = chance.exponential(1.0, 128)
    sixteen = rounded - gain + chance.normal(0, 0.5, 128)  # the standard error of the difference is 0.044
    assert choose({"dequantized 4-bit base": measured(rounded), "16-bit base": measured(sixteen)}) == way


def test_one_row_tells_nothing_and_one_way_is_taken() -> None:
    low, high = measured(np.array([0.1])), measured(np.array([0.9]))
    assert choose({"dequantized 4-bit base": high, "16-bit base": low}) == "dequantized 4-bit base"
    assert choose({"16-bit base": high}) == "16-bit base"
