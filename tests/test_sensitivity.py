"""Which layers rounding hurts: the estimate against the divergence measured, and which grid each gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qft.base_model import load
from qft.data.encode import Encoded
from qft.kernels.decoder import decoder
from qft.quant.fit import decoder_linears
from qft.quant.gptq import quantize_gptq
from qft.quant.grids import Scheme, dequantize, quantize_nearest
from qft.training.runner import prefill
from qft.training.sensitivity import Felt, choose_grids, expected_divergence, feel, watched
from tests.test_training import FORWARD, rows

GRIDS = COARSE, MIDDLE, FINE = Scheme(4, 64), Scheme(4, 32), Scheme(8, 64, symmetric=True)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load(tiny_model, base="none", double_quant=False, compute_dtype="float32").eval()


def passed(model: Any, batch: list[Encoded]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name → inputs x and gradients g of its outputs by autograd, a row at a time without padding, float64."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def watch(name: str) -> Any:
        def look(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0][0].detach().double()
            output.register_hook(lambda g: seen.setdefault(name, []).append((x, g[0].double())))

        return look

    hooks = [linear.register_forward_hook(watch(name)) for name, linear in decoder_linears(model).items()]
    model.requires_grad_(True)
    for row in batch:
        torch.log_softmax(model(input_ids=torch.tensor([row.input_ids])).logits, -1)[..., 3].sum().backward()
    for hook in hooks:
        hook.remove()
    return {name: tuple(torch.cat(column) for column in zip(*pairs, strict=True)) for name, pairs in seen.items()}  # type: ignore[misc]


def third_log_p(model: Any, batch: list[Encoded]) -> Tensor:
    """Of token 3, at every position, through the kernels."""
    fast = decoder(model)
    assert fast is not None
    hidden = fast.hidden([row.input_ids for row in batch])
    return torch.log_softmax(hidden @ fast.head.weight.t(), -1)[..., 3].sum()


@pytest.mark.parametrize("kernels", [True, False])
def test_what_is_felt_is_what_autograd_passes_back(model: Any, kernels: bool) -> None:
    """Also where rows of a batch are filled up."""
    batch, block = rows(5), 32
    assert len({len(row.input_ids) for row in batch}) > 1
    wanted = passed(model, batch)
    with watched(model, block) as felt:
        if kernels:
            third_log_p(model, batch).backward()
        else:
            fed = prefill(model, [row.input_ids for row in batch], 0, keep=max(len(row.input_ids) for row in batch))
            real = torch.cat([logits[-len(row.input_ids) :] for row, logits in zip(batch, fed.logits, strict=True)])
            torch.log_softmax(real, -1)[..., 3].sum().backward()
    assert felt.keys() == wanted.keys()
    groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
    for name, (x, g) in wanted.items():
        blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).square().view(len(x), -1, block).sum(-1)
        squares = g.square().t() @ blocks
        torch.testing.assert_close(felt[name].squares.double(), squares, rtol=1e-3, atol=1e-4 * float(squares.max()))
        layer, kind = name[: len("model.layers.0")], name[len("model.layers.0.") :]
        readers = next((group for group in groups if kind in group), [kind])
        strength = sum(wanted[f"{layer}.{reader}"][1].norm(dim=-1) for reader in readers)
        hessian = (x * strength[:, None]).t() @ x
        hessian /= hessian.diagonal().mean()
        torch.testing.assert_close(felt[name].hessian.double(), hessian, rtol=2e-2, atol=1e-3)  # factors of 8 bits
        assert all(felt[f"{layer}.{reader}"].hessian is felt[name].hessian for reader in readers)


def test_the_expectation_is_near_the_divergence_measured(model: Any) -> None:
    some = rows(64, seed=5)
    felt = feel(model, some, 64, forward=FORWARD, seed=0)
    expected, measured = {}, {}
    with torch.no_grad():
        teacher = FORWARD.ask(model, some)
        for name, linear in decoder_linears(model).items():
            expected[name] = expected_divergence(linear.weight, felt[name], 64, COARSE)
            kept, linear.weight.data = linear.weight.data, dequantize(quantize_nearest(linear.weight, COARSE))
            measured[name] = FORWARD.divergence(model, some, teacher).item()
            linear.weight.data = kept
    assert sum(expected.values()) == pytest.approx(sum(measured.values()), rel=0.3)
    pairs = np.log([[expected[name], measured[name]] for name in measured])
    assert np.corrcoef(pairs.T)[0, 1] > 0.9


def test_positions_the_answers_hang_on_are_rounded_better() -> None:
    """Two layers of one weight and one set of inputs; the gradient reaches half of the positions."""
    chance = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 128, generator=chance), torch.randn(600, 128, generator=chance)
    strength = torch.cat([torch.ones(300), 0.01 * torch.ones(300)])
    errors = {}
    for name, hessian in {"felt": (x * strength[:, None]).t() @ x, "plain": x.t() @ x}.items():
        off = (dequantize(quantize_gptq(weight, hessian, COARSE)[0]) - weight) @ x[:300].t()
        errors[name] = off.norm().item()
    assert errors["felt"] < 0.95 * errors["plain"]


def test_a_layer_that_nothing_passed_through_is_there_all_the_same(model: Any) -> None:
    with watched(model, 64) as felt:
        pass
    assert felt.keys() == decoder_linears(model).keys()
    name, linear = next(iter(decoder_linears(model).items()))
    assert felt[name].hessian.shape == (linear.in_features, linear.in_features)
    assert expected_divergence(linear.weight, felt[name], 64, COARSE) == 0


def test_a_block_of_zeros_costs_nothing() -> None:
    weight, squares = torch.randn(8, 128), torch.rand(8, 4)
    whole = expected_divergence(weight[:, 64:], Felt(torch.eye(64), squares[:, 2:]), 32, COARSE)
    weight[:, :64] = 0
    assert expected_divergence(weight, Felt(torch.eye(128), squares), 32, COARSE) == pytest.approx(whole)


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
