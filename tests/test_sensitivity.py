"""Which layers rounding hurts: the estimate against the divergence measured, and which grid each gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qft.base_model import load
from qft.quant.fit import Fitted, decoder_linears, dense, expected_error
from qft.quant.grids import Scheme, dequantize, quantize_nearest
from qft.training.sensitivity import _moves_watched, choose_grids, divergences
from tests.test_training import FORWARD, rows

GRIDS = COARSE, MIDDLE, FINE = Scheme(4, 64), Scheme(4, 32), Scheme(8, 64, symmetric=True)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load(tiny_model, base="none", double_quant=False, compute_dtype="float32").eval()


def rounded(model: Any) -> dict[str, Fitted]:
    matrices = {name: quantize_nearest(linear.weight, COARSE) for name, linear in decoder_linears(model).items()}
    return {name: Fitted(matrix, torch.empty(0), torch.ones_like(matrix.scales)) for name, matrix in matrices.items()}


def test_a_move_is_the_product_of_the_weights_gradient_and_its_rounding(model: Any) -> None:
    fitted, ids = rounded(model), torch.tensor([rows(1)[0].input_ids])
    with _moves_watched(model, fitted) as shares:
        torch.log_softmax(model(input_ids=ids).logits, -1)[..., 3].sum().backward()
        moves = {name: share.grad.item() for name, share in shares.items()}
    model.requires_grad_(True)
    torch.log_softmax(model(input_ids=ids).logits, -1)[..., 3].sum().backward()
    for name, linear in decoder_linears(model).items():
        exact = (linear.weight.grad.double() * (dense(fitted[name]) - linear.weight).double()).sum().item()
        assert moves[name] == pytest.approx(exact, rel=0.02, abs=1e-3)  # the rounding is watched in bfloat16


def test_the_estimate_is_near_the_divergence_measured(model: Any) -> None:
    fitted, some = rounded(model), rows(16, seed=5)
    estimated = divergences(model, some, fitted, forward=FORWARD, seed=0)
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


def test_what_is_expected_of_a_grid_is_near_what_rounding_to_it_costs() -> None:
    chance = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 200, generator=chance), torch.randn(500, 200, generator=chance)
    hessian = x.t() @ x
    for scheme in GRIDS:
        off = dequantize(quantize_nearest(weight, scheme)) - weight
        measured = float(((off @ hessian) * off).sum())
        assert expected_error(weight, hessian, scheme) == pytest.approx(measured, rel=0.4)  # ranges are searched, too


def test_a_block_of_zeros_costs_nothing() -> None:
    weight, hessian = torch.randn(8, 128), torch.eye(128)
    whole = expected_error(weight[:, 64:], hessian[64:, 64:], COARSE)
    weight[:, :64] = 0
    assert expected_error(weight, hessian, COARSE) == pytest.approx(whole)


sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))
divergence = st.floats(1e-6, 1.0)


@given(
    st.lists(st.tuples(st.tuples(divergence, divergence, divergence), sizes), min_size=1, max_size=12), st.floats(3, 12)
)
def test_the_bits_last_and_nothing_that_would_fit_is_left_out(
    layers: list[tuple[tuple[float, float, float], tuple[int, int]]], most_bits: float
) -> None:
    hurt = {str(i): dict(zip(GRIDS, found, strict=True)) for i, (found, _) in enumerate(layers)}
    shapes = {str(i): shape for i, (_, shape) in enumerate(layers)}
    chosen = choose_grids(hurt, shapes, most_bits)
    limit = most_bits / 8 * sum(rows * cols for rows, cols in shapes.values())

    def stored(grids: dict[str, Scheme]) -> int:
        return sum(scheme.stored_bytes(*shapes[name]) for name, scheme in grids.items())

    least = {name: min(GRIDS, key=lambda scheme: scheme.stored_bytes(*shapes[name])) for name in shapes}
    assert chosen == least or stored(chosen) <= limit
    for name, found in hurt.items():
        better = [scheme for scheme in GRIDS if found[scheme] < found[chosen[name]]]
        more = [
            scheme for scheme in better if scheme.stored_bytes(*shapes[name]) > chosen[name].stored_bytes(*shapes[name])
        ]
        assert all(stored(chosen | {name: scheme}) > limit for scheme in more)


def test_the_layer_that_hurts_most_comes_first() -> None:
    shapes = dict.fromkeys("abc", (64, 64))
    hurt = {
        name: {COARSE: value, MIDDLE: 0.95 * value, FINE: 0.0}
        for name, value in zip("abc", (0.1, 0.3, 0.2), strict=True)
    }
    assert choose_grids(hurt, shapes, 6.0) == {"a": COARSE, "b": FINE, "c": COARSE}
    assert choose_grids(hurt, shapes, 6.2) == {"a": COARSE, "b": FINE, "c": MIDDLE}
    assert choose_grids(hurt, shapes, 4.6) == dict.fromkeys("abc", COARSE)
    assert choose_grids(hurt, shapes, 1.0) == dict.fromkeys("abc", COARSE)
