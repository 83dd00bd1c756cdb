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
from qft.quant.grids import Quantized, Scheme, in_blocks


class ByWeight(torch.nn.Module):
    """A linear layer whose parameters learn by way of its weight: y = x Wᵀ + bias, W made from them.

    A subclass says what learns, what W is, and the gradient of each parameter.
    """

    def __init__(self, rows: int, cols: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = cols, rows, bias

    def forward(self, x: Tensor) -> Tensor:
        """x: float (…, cols) → (…, rows)."""
        y = _ByWeight.apply(x, self, *self.learning)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def learning(self) -> list[Tensor]:
        """The parameters, in the order of `gradients`."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(rows, cols), without a gradient."""
        raise NotImplementedError

    def gradients(self, dy: Tensor, x: Tensor) -> list[Tensor]:
        """dy: float (positions, rows), the gradient of the output; x: (positions, cols). W's own gradient is dyᵀ x."""
        raise NotImplementedError


class _ByWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: ByWeight, *_: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        grad_x = gradient @ ctx.layer.dense(gradient.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, *ctx.layer.gradients(gradient.flatten(0, -2), x.flatten(0, -2))


class GridLinear(ByWeight):
    """W on its grid.

    fitted: where scales, zero points and gain start, and L, whose nearest codes are the first ones. What learns: gain, float32
    (rows, k_blocks), and the float32 adapter of rank r. A weight takes two bytes for L, float16, and its own of `dtype` for W.
    """

    def __init__(self, fitted: Fitted, bias: Tensor | None, *, r: int, seed: int, dtype: torch.dtype) -> None:
        matrix, (rows, cols) = fitted.matrix, fitted.latent.shape
        super().__init__(rows, cols, bias)
        chance = torch.Generator().manual_seed(seed)
        self.scheme: Scheme = matrix.scheme
        self.latent, self.dtype = fitted.latent, dtype
        self.zero_points = matrix.zero_points
        self.scales = matrix.scales.float()
        self.gain = torch.nn.Parameter(fitted.gain.clone())
        self.a = torch.nn.Parameter(torch.randn(r, cols, generator=chance) / cols**0.5)
        self.b = torch.nn.Parameter(torch.zeros(rows, r))
        self.round_again()  # L in float16 is now and then as near to the next code

    @property
    def learning(self) -> list[Tensor]:
        """Gain, A and B."""
        return [self.gain, self.a, self.b]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(rows, cols), as the last `round_again` left it."""
        return self.weight.to(dtype)

    def gradients(self, dy: Tensor, x: Tensor) -> list[Tensor]:
        """float32. Of the gain: its block's steps, W / gain, times W's gradient. Of A and B: LoRA's own, gain times W's gradient.

        One product more than LoRA's: W's gradient, whole. It is not kept.
        """
        blocks = in_blocks(dy.t() @ x, self.scheme.block)
        weight = in_blocks(self.dense(dy.dtype), self.scheme.block)
        of_gain = (weight * blocks).sum(-1, dtype=torch.float32).div_(self.gain)
        moved = blocks.mul_(self.gain[..., None]).reshape(self.out_features, -1)[:, : self.in_features]
        a, b = self.a.detach().to(moved.dtype), self.b.detach().to(moved.dtype)
        return [of_gain, (b.t() @ moved).float(), (moved @ a.t()).float()]

    @torch.no_grad()
    def round_again(self) -> None:
        """W for the adapter and the gain as they now are. To be called after every optimizer step."""
        steps = self._steps().mul_((self.scales * self.gain)[..., None])
        self.weight = steps.reshape(self.out_features, -1)[:, : self.in_features].to(self.dtype)

    def _steps(self) -> Tensor:
        """float32 (rows, k_blocks, block): codes less zero points, how many steps of the grid a weight is from zero."""
        zeros = self.zero_points[..., None].float()
        moved = torch.addmm(self.latent.float(), self.b, self.a)
        steps = in_blocks(moved, self.scheme.block).div_(self.scales[..., None]).round_()
        return steps.add_(zeros).clamp_(0, self.scheme.top).sub_(zeros)

    @property
    @torch.no_grad()
    def codes(self) -> Tensor:
        """uint8 (rows, k_blocks, block)."""
        return self._steps().add_(self.zero_points[..., None]).to(torch.uint8)

    @torch.no_grad()
    def matrix(self) -> Quantized:
        """What ships."""
        scales = (self.scales * self.gain).to(self.scheme.scale_type)
        return Quantized(self.codes, scales, self.zero_points, self.in_features, self.scheme)

    def clamped_percent(self) -> float:
        """Share of weights on the first or last code: those that the grid may hold back."""
        codes = self.codes
        at_edge = (codes == 0) | (codes == self.scheme.top)
        return 100 * at_edge.float().mean().item()


def put_on_grid(model: Any, fitted: dict[str, Fitted], *, r: int, seed: int) -> None:
    """Replace the named linear layers of a model; everything else is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for number, (name, found) in enumerate(fitted.items()):
        old = model.get_submodule(name)
        bias = None if old.bias is None else old.bias.detach()
        new = GridLinear(found, bias, r=r, seed=seed + number, dtype=old.weight.dtype)
        model.set_submodule(name, new)


def grid_layers(model: Any) -> Iterator[tuple[str, GridLinear]]:
    """(name, layer) of every layer on a grid."""
    for name, module in model.named_modules():
        if isinstance(module, GridLinear):
            yield name, module
