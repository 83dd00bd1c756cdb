"""The training layer on a grid, against PEFT and against float64."""

from __future__ import annotations

from pathlib import Path

import torch

from qft.base_model import load
from qft.quant.linear import Grid, RoundedLinear, base_weight, grids_of, lora_layers, put_on_grid
from qft.training.lora import attach


def test_gradients_are_loras_own_in_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 24), (16, 4)))
    weight, w0, scale = torch.randn(16, 24, dtype=torch.float64), torch.randn(16, 24, dtype=torch.float64), 2.0
    upstream = torch.randn(3, 5, 16, dtype=torch.float64)
    ours = torch.autograd.grad(RoundedLinear.apply(x, a, b, weight, scale), (x, a, b), upstream)
    plain = torch.nn.functional.linear(x, w0 + scale * b @ a)
    _, grad_a, grad_b = torch.autograd.grad(plain, (x, a, b), upstream)
    # The products pass through float32 once on the way to the float32 adapter.
    torch.testing.assert_close(ours[1].double(), grad_a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[2].double(), grad_b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[0], upstream @ weight)


def test_a_layer_on_its_grid_computes_with_values_of_the_grid_alone(tiny_model: Path) -> None:
    model = load(tiny_model, base="nf4", double_quant=True, compute_dtype="float32")
    tuned = attach(model, r=4, alpha=8, dropout=0.0, target_modules="all-linear", seed=0)
    name, layer = next(iter(lora_layers(tuned)))
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    grids = grids_of(tuned, bits=4, block=32)
    put_on_grid(tuned, grids)
    adapted = base_weight(layer.base_layer) + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(7, layer.in_features)
    torch.testing.assert_close(layer(x), x @ grids[name].rounded(adapted.detach()).t(), rtol=1e-5, atol=1e-5)


def test_eval_sees_what_training_has_just_changed(tiny_model: Path) -> None:
    model = load(tiny_model, base="nf4", double_quant=True, compute_dtype="float32")
    tuned = attach(model, r=4, alpha=8, dropout=0.0, target_modules="all-linear", seed=0)
    put_on_grid(tuned, grids_of(tuned, bits=4, block=32))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = tuned.eval()(ids).logits
    tuned.train()
    loss = tuned(ids, labels=ids).loss
    loss.backward()
    for _, layer in lora_layers(tuned):
        layer.lora_B["default"].weight.data -= 5.0 * layer.lora_B["default"].weight.grad
    with torch.no_grad():
        after = tuned.eval()(ids, labels=ids)
    assert not torch.equal(before, after.logits)
    assert after.loss < loss


def test_a_fine_grid_computes_what_peft_computes(tiny_model: Path) -> None:
    model = load(tiny_model, base="none", double_quant=False, compute_dtype="float32")
    tuned = attach(model, r=4, alpha=8, dropout=0.0, target_modules="all-linear", seed=0)
    for _, layer in lora_layers(tuned):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = tuned.eval()(ids).logits
    step = 2.0**-20  # 24 bits of grid: as good as none
    grids = {}
    for name, layer in lora_layers(tuned):
        blocks = (layer.out_features, -(-layer.in_features // 32))
        grids[name] = _WideGrid(torch.full(blocks, step), torch.zeros(blocks, dtype=torch.uint8), 4, 32)
    put_on_grid(tuned, grids)
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, expected, rtol=1e-4, atol=1e-4)


class _WideGrid(Grid):
    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.round(weight / 2.0**-20) * 2.0**-20
