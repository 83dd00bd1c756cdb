"""Which layers rounding hurts: the estimate against the divergence measured, and who gets the fine grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qft.base_model import load
from qft.quant.fit import Fitted, decoder_linears, dense, fit_nearest
from qft.quant.grids import Scheme
from qft.training.sensitivity import _moves_watched, choose_fine, divergences
from tests.test_training import PAD, rows

COARSE, FINE = Scheme(4, 64), Scheme(8, 64, symmetric=True)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load(tiny_model, base="none", double_quant=False, compute_dtype="float32").eval()


def rounded(model: Any) -> dict[str, Fitted]:
    return {name: fit_nearest(linear.weight, COARSE) for name, linear in decoder_linears(model).items()}


def test_a_move_is_the_product_of_the_weights_gradient_and_its_rounding(model: Any) -> None:
    fitted, ids = rounded(model), torch.tensor([rows(1)[0].input_ids])
    with _moves_watched(model, fitted) as moves:
        torch.log_softmax(model(input_ids=ids).logits, -1)[..., 3].sum().backward()
    model.requires_grad_(True)
    torch.log_softmax(model(input_ids=ids).logits, -1)[..., 3].sum().backward()
    for name, linear in decoder_linears(model).items():
        exact = (linear.weight.grad.double() * (dense(fitted[name]) - linear.weight).double()).sum().item()
        assert moves[name] == pytest.approx(exact, rel=0.02, abs=1e-3)  # the rounding is watched in bfloat16


def test_the_estimate_is_near_the_divergence_measured(model: Any) -> None:
    fitted, some = rounded(model), rows(16, seed=5)
    estimated = divergences(model, some, fitted, pad_id=PAD, seed=0)
    measured = {}
    with torch.no_grad():
        log_p = [torch.log_softmax(model(input_ids=torch.tensor([row.input_ids])).logits, -1) for row in some]
        for name, linear in decoder_linears(model).items():
            kept, linear.weight.data = linear.weight.data, dense(fitted[name])
            log_q = [torch.log_softmax(model(input_ids=torch.tensor([row.input_ids])).logits, -1) for row in some]
            linear.weight.data = kept
            total = sum((p.exp() * (p - q)).sum().item() for p, q in zip(log_p, log_q, strict=True))
            measured[name] = total / sum(len(row.input_ids) for row in some)
    assert sum(estimated.values()) == pytest.approx(sum(measured.values()), rel=0.5)  # 16 samples a layer
    pairs = np.log([[estimated[name], measured[name]] for name in measured])
    assert np.corrcoef(pairs.T)[0, 1] > 0.7


sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@given(st.lists(st.tuples(st.floats(1e-6, 1.0), sizes), min_size=1, max_size=12), st.floats(3.0, 12.0))
def test_the_bits_last_and_nothing_that_would_fit_is_left_out(
    layers: list[tuple[float, tuple[int, int]]], most_bits: float
) -> None:
    hurt = {str(i): value for i, (value, _) in enumerate(layers)}
    shapes = {str(i): shape for i, (_, shape) in enumerate(layers)}
    chosen = choose_fine(hurt, shapes, COARSE, FINE, most_bits)
    limit = most_bits / 8 * sum(rows * cols for rows, cols in shapes.values())

    def stored(fine: set[str]) -> int:
        return sum((FINE if name in fine else COARSE).stored_bytes(*shape) for name, shape in shapes.items())

    assert not chosen or stored(chosen) <= limit
    assert all(stored(chosen | {name}) > limit for name in shapes.keys() - chosen)


def test_the_layer_that_hurts_most_comes_first() -> None:
    shapes = dict.fromkeys("abc", (64, 64))
    assert choose_fine({"a": 0.1, "b": 0.3, "c": 0.2}, shapes, COARSE, FINE, 6.0) == {"b"}
    assert choose_fine({"a": 0.1, "b": 0.3, "c": 0.2}, shapes, COARSE, FINE, 4.5) == set()
