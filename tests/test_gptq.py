"""Fitted rounding: what it must beat, and what must hold of its codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qft.quant.gptq import quantize_gptq, refit_scales, revisit
from qft.quant.grids import Scheme, dequantize, quantize_nearest, round_to, to_blocks


def correlated_inputs(cols: int, seed: int) -> Tensor:
    """Inputs as layers see them: a few directions carry most of their size."""
    chance = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=chance) * torch.linspace(1, 0.02, cols)
    return torch.randn(4 * cols, cols, generator=chance) @ mix


def output_error(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    x = inputs.double()
    return ((x @ (weight - other).double().t()).square().mean() / (x @ weight.double().t()).square().mean()).item()


@pytest.mark.parametrize("cols", [96, 90])
@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(4, 64), Scheme(4, 32, True), Scheme(4, 16, False, torch.float16)]
)
def test_outputs_change_less_than_with_nearest_rounding(scheme: Scheme, cols: int) -> None:
    weight, inputs = torch.randn(40, cols, generator=torch.Generator().manual_seed(1)), correlated_inputs(cols, 2)
    hessian = inputs.t() @ inputs
    nearest = dequantize(quantize_nearest(weight, scheme))
    matrix, latent = quantize_gptq(weight, hessian, scheme)
    error = output_error(weight, dequantize(matrix), inputs)
    assert error < 0.6 * output_error(weight, nearest, inputs)
    gain = refit_scales(weight, matrix, hessian)
    refit = to_blocks(dequantize(matrix), scheme.block) * gain[..., None]
    assert output_error(weight, refit.reshape(40, -1)[:, :cols], inputs) < error
    again, visited = revisit(weight, matrix, hessian)
    assert output_error(weight, dequantize(again), inputs) <= error * 1.001  # the visit's own form is damped
    for found, of in ((matrix, latent), (again, visited)):  # a latent weight is one whose nearest codes these are
        codes = round_to(to_blocks(of, scheme.block), found.scales, found.zero_points, scheme)
        assert torch.equal(codes, found.codes)


def test_no_single_code_could_be_better_after_many_visits() -> None:
    weight, inputs = torch.randn(4, 40, generator=torch.Generator().manual_seed(5)), correlated_inputs(40, 6)
    hessian = (inputs.t() @ inputs).double()
    matrix = quantize_nearest(weight, Scheme(4, 16))
    for _ in range(30):
        matrix, _ = revisit(weight, matrix, hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)

    def error(codes: Tensor) -> Tensor:
        d = (dequantize(replace(matrix, codes=codes)) - weight).double()
        return (d @ damped * d).sum(-1)

    least = error(matrix.codes)
    for column in range(40):
        for step in (-1, 1):
            codes = matrix.codes.clone()
            place = (slice(None), column // 16, column % 16)
            codes[place] = (codes[place].int() + step).clamp(0, 15).to(torch.uint8)
            assert (error(codes) >= least * (1 - 1e-5)).all()


def test_refit_scales_are_the_least_squares_solution_in_float64() -> None:
    weight, inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)), correlated_inputs(64, 4)
    hessian = inputs.t() @ inputs
    matrix = quantize_nearest(weight, Scheme(4, 32))
    gain = refit_scales(weight, matrix, hessian)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(64)
    factor = torch.linalg.cholesky(damped).t()  # ‖factor e‖² = eᵀ H e
    for row in range(3):
        columns = torch.zeros(64, 2, dtype=torch.float64)
        values = dequantize(matrix)[row].double()
        columns[:32, 0], columns[32:, 1] = values[:32], values[32:]
        best = torch.linalg.lstsq(factor @ columns, factor @ weight[row].double()).solution
        torch.testing.assert_close(
            gain[row].double(), best, rtol=0.01, atol=0.002
        )  # a thousandth is kept on the diagonal


def test_inputs_nothing_was_fed_are_rounded_all_the_same() -> None:
    weight = torch.randn(8, 64)
    matrix, _ = quantize_gptq(weight, torch.zeros(64, 64), Scheme(4, 32))
    assert output_error(weight, dequantize(matrix), torch.eye(64)) < 0.02
