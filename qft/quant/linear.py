"""A linear layer whose weight lies on the grid that ships, and what may learn there.

    W = gain · s · (clamp(round((L + B·A) / s) + z, 0, 2^bits - 1) - z)

L is the weight before its rounding, s and z are the scales and zero points found for it. The adapter A, B inside the rounding
moves codes (as in L4Q, arXiv 2402.04902, and LR-QAT, arXiv 2406.06385), `gain` the scale of each block (as in EfficientQAT,
arXiv 2407.11062). Gradients pass the rounding straight through (arXiv 1308.3432). Codes are made anew once an optimizer step;
the last ones, with the scales s · gain, are what is written into the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qft.quant.fit import Fitted
from qft.quant.grids import Quantized, Scheme, to_blocks


class GridLinear(torch.nn.Module):
    """y = x Wᵀ + bias with W on its grid.

    fitted: where scales, zero points and gain start, and L, whose nearest codes are the first ones. A weight takes three bytes:
    one for its code, two for L, float16. What learns: gain, float32 (rows, k_blocks), and the float32 adapter of rank r.
    """

    def __init__(self, fitted: Fitted, bias: Tensor | None, *, r: int, seed: int) -> None:
        super().__init__()
        matrix, (rows, cols) = fitted.matrix, fitted.latent.shape
        chance = torch.Generator().manual_seed(seed)
        self.scheme: Scheme = matrix.scheme
        self.in_features, self.out_features = cols, rows
        self.latent, self.bias = fitted.latent, bias
        self.zero_points = matrix.zero_points
        self.scales = matrix.scales.float()
        self.gain = torch.nn.Parameter(fitted.gain.clone())
        self.a = torch.nn.Parameter(torch.randn(r, cols, generator=chance) / cols**0.5)
        self.b = torch.nn.Parameter(torch.zeros(rows, r))
        self.round_again()  # L in float16 is now and then as near to the next code

    def forward(self, x: Tensor) -> Tensor:
        """x: float (…, cols) → (…, rows)."""
        y = _OnGrid.apply(x, self.gain, self.a, self.b, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def steps(self) -> Tensor:
        """float32 (rows, k_blocks, block): codes less zero points, how many steps of the grid a weight is from zero."""
        return self.codes.float().sub_(self.zero_points.float()[..., None])

    @torch.no_grad()
    def round_again(self) -> None:
        """Codes for the adapter as it now is. To be called after every optimizer step."""
        moved = torch.addmm(self.latent.float(), self.b, self.a)
        steps = to_blocks(moved, self.scheme.block).div_(self.scales[..., None]).round_()
        self.codes = steps.add_(self.zero_points[..., None]).clamp_(0, self.scheme.top).to(torch.uint8)

    @torch.no_grad()
    def matrix(self) -> Quantized:
        """What ships."""
        scales = (self.scales * self.gain).to(self.scheme.scale_type)
        return Quantized(self.codes, scales, self.zero_points, self.in_features, self.scheme)

    @torch.no_grad()
    def clamped_percent(self) -> float:
        """Share of weights on the first or last code: those that the grid may hold back."""
        at_edge = (self.codes == 0) | (self.codes == self.scheme.top)
        return 100 * at_edge.float().mean().item()


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, a: Tensor, b: Tensor, layer: GridLinear) -> Tensor:
        ctx.save_for_backward(x, gain, a, b)
        ctx.layer = layer
        return torch.nn.functional.linear(x, _dense(layer, layer.steps(), gain).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """One product more than LoRA's: the full gradient of W, from which gain, a and b take theirs. It is not kept."""
        x, gain, a, b = ctx.saved_tensors
        layer: GridLinear = ctx.layer
        steps = layer.steps()
        grad_x = gradient @ _dense(layer, steps, gain).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).float()
        blocks = to_blocks(of_weight, layer.scheme.block)
        grad_gain = steps.mul_(blocks).sum(-1).mul_(layer.scales)
        moved = blocks.mul_(gain[..., None]).reshape(len(blocks), -1)[:, : layer.in_features]
        return grad_x, grad_gain, b.t() @ moved, moved @ a.t(), None


def _dense(layer: GridLinear, steps: Tensor, gain: Tensor) -> Tensor:
    """float32 (rows, cols)."""
    blocks = steps * (layer.scales * gain)[..., None]
    return blocks.reshape(len(blocks), -1)[:, : layer.in_features]


def put_on_grid(model: Any, fitted: dict[str, Fitted], *, r: int, seed: int) -> None:
    """Replace the named linear layers of a model; everything else is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for number, (name, found) in enumerate(fitted.items()):
        old = model.get_submodule(name)
        bias = None if old.bias is None else old.bias.detach()
        new = GridLinear(found, bias, r=r, seed=seed + number)
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)


def grid_layers(model: Any) -> Iterator[tuple[str, GridLinear]]:
    """(name, layer) of every layer on a grid."""
    for name, module in model.named_modules():
        if isinstance(module, GridLinear):
            yield name, module
