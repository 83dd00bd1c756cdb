"""The layer on a grid: what it computes, its gradients in float64, and that what it trained is what it hands over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qft.quant.fit import Fitted
from qft.quant.grids import Scheme, dequantize, quantize_nearest, to_blocks
from qft.quant.linear import GridLinear

SCHEMES = [Scheme(4, 32), Scheme(4, 64, True), Scheme(4, 16, False, torch.float16)]


def layer_on(scheme: Scheme, rows: int = 24, cols: int = 80, seed: int = 0) -> GridLinear:
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=chance)
    matrix = quantize_nearest(weight, scheme)
    layer = GridLinear(
        Fitted(matrix, weight.half(), torch.ones(matrix.scales.shape)), None, r=4, seed=seed, dtype=torch.float32
    )
    torch.nn.init.normal_(layer.b, std=0.05, generator=chance)
    torch.nn.init.normal_(layer.gain, mean=1.0, std=0.05, generator=chance)
    layer.round_again()
    return layer


def through_autograd(layer: GridLinear, x: Tensor, *, mask: bool) -> tuple[Tensor, ...]:
    """y and the gradients of its sum of squares for x, gain, a, b: the formula in float64, rounding passed straight through."""
    x, gain, a, b = (t.detach().double().requires_grad_() for t in (x, layer.gain, layer.a, layer.b))
    scales, zeros = layer.scales.double()[..., None], layer.zero_points.double()[..., None]
    moved = layer.latent.double() + b @ a
    padded = torch.nn.functional.pad(moved, (0, -layer.in_features % layer.scheme.block))
    real = padded.reshape(len(moved), -1, layer.scheme.block) / scales
    rounded = real + (real.round() - real).detach()
    clamped = (rounded + zeros).clamp(0, layer.scheme.top) - zeros
    steps = clamped if mask else rounded + (clamped - rounded).detach()
    weight = (steps * scales * gain[..., None]).reshape(len(moved), -1)[:, : layer.in_features]
    y = x @ weight.t()
    y.square().sum().backward()
    return (y.detach(), *(t.grad for t in (x, gain, a, b)))  # type: ignore[misc]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_and_gradients_are_autograds_in_float64(scheme: Scheme) -> None:
    layer = layer_on(scheme)
    x = torch.randn(5, 7, 80, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    expected = through_autograd(layer, x, mask=False)
    for ours, reference in zip(
        (y.detach(), x.grad, layer.gain.grad, layer.a.grad, layer.b.grad), expected, strict=True
    ):
        assert ours is not None
        size = reference.abs().max().item()
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-5 * size)  # float32 sums of 560 terms


def test_a_clamped_weight_keeps_its_gradient_so_that_it_can_come_back() -> None:
    """The clamp's own gradient, zero beyond the last code, is left out on purpose: only clamped weights differ."""
    layer = layer_on(Scheme(4, 32))
    layer.latent[:, 3] += 20 * layer.scales.max().half()
    layer.round_again()
    assert layer.clamped_percent() > 0
    x = torch.randn(9, 80, generator=torch.Generator().manual_seed(2))
    layer(x).square().sum().backward()
    masked, unmasked = (through_autograd(layer, x, mask=flag) for flag in (True, False))
    assert layer.a.grad is not None
    torch.testing.assert_close(
        layer.a.grad.double(), unmasked[3], rtol=1e-3, atol=1e-5 * unmasked[3].abs().max().item()
    )
    assert (masked[3][:, 3] - unmasked[3][:, 3]).abs().max() > 1e-3 * unmasked[3].abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_trained_is_what_it_hands_over(scheme: Scheme) -> None:
    layer = layer_on(scheme)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.0)
    x = torch.randn(40, 80, generator=torch.Generator().manual_seed(3))
    before = layer.codes.clone()
    for _ in range(5):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.round_again()
    assert (layer.codes != before).any()
    matrix = layer.matrix()
    assert torch.equal(matrix.codes, layer.codes)
    assert torch.equal(matrix.zero_points, layer.zero_points)
    tolerance = 1e-6 if scheme.scale_type == torch.float32 else 1e-3  # float16 scales are rounded when they are written
    torch.testing.assert_close(x @ dequantize(matrix).t(), layer(x).detach(), rtol=tolerance, atol=20 * tolerance)


def test_a_weight_lies_on_its_grid_alone() -> None:
    layer = layer_on(Scheme(4, 32))
    weight = layer(torch.eye(80)).detach().t()
    steps = to_blocks(weight, 32) / (layer.scales * layer.gain.detach())[..., None]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert torch.equal(steps.round() + layer.zero_points[..., None], layer.codes.float())
