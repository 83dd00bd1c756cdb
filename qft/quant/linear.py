"""Training on the grid that ships: every linear layer computes with W0 + scale·B·A rounded to its int4 grid.

The rounding is inside the forward pass; gradients pass it straight through (arXiv 1308.3432) to LoRA's own A and B. The
block scales and zero points are those of W0, found once: with scales taken anew at every step the result was the same
(perplexity 13.12 and 13.09, EVIDENCE). What is learnt is therefore what the exported file computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qft.progress import OnProgress, Progress, silent
from qft.quant.grids import quantize_nearest, to_blocks

WeightOf = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class Grid:
    """The values one matrix can take. scales: float32 and zero_points: uint8 (rows, k_blocks), as MatMulNBits has them."""

    scales: Tensor
    zero_points: Tensor
    bits: int
    block: int

    @staticmethod
    def of(weight: Tensor, *, bits: int, block: int) -> Grid:
        """The grid that rounds `weight`, float (rows, cols), with the least squared error."""
        found = quantize_nearest(weight, bits=bits, block=block)
        return Grid(found.scales, found.zero_points, bits, block)

    def codes(self, weight: Tensor) -> Tensor:
        """uint8 (rows, k_blocks, block): the nearest point of the grid for each weight, float (rows, cols)."""
        zeros = self.zero_points.float()[..., None]
        blocks = to_blocks(weight, self.block) / self.scales[..., None]
        return blocks.round_().add_(zeros).clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def rounded(self, weight: Tensor) -> Tensor:
        """float32 (rows, cols): `weight` with every value moved to the grid."""
        zeros = self.zero_points.float()[..., None]
        scales = self.scales[..., None]
        blocks = to_blocks(weight, self.block).div_(scales).round_()
        low, high = -zeros, 2**self.bits - 1 - zeros
        return torch.clamp(blocks, low, high).mul_(scales).reshape(weight.shape[0], -1)[:, : weight.shape[1]]


def base_weight(layer: Any) -> Tensor:
    """float32 (rows, cols): the frozen weight of a linear layer, dequantized where bitsandbytes holds it in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.detach().float()
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(layer.weight.data, state).float()


class RoundedLinear(torch.autograd.Function):
    """y = x Wᵀ with W = grid(W0 + s·B·A); backward as LoRA's: the rounding counts as the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, scale: float) -> Tensor:
        """x: (…, cols); a: (r, cols); b: (rows, r); weight: (rows, cols), rounded, in x's dtype."""
        ctx.save_for_backward(x, a, b, weight)
        ctx.scale = scale
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of x, a and b."""
        x, a, b, weight = ctx.saved_tensors
        flat, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        a, b = a.to(flat.dtype), b.to(flat.dtype)
        down, up = rows @ a.t(), flat @ b  # (tokens, r) each
        grad_b = ctx.scale * (flat.t() @ down).float()
        grad_a = ctx.scale * (up.t() @ rows).float()
        grad_x = (gradient @ weight) if ctx.needs_input_grad[0] else None
        return grad_x, grad_a, grad_b, None, None


def put_on_grid(model: Any, grids: dict[str, Grid]) -> None:
    """Make every adapted layer of a PEFT model compute with its rounded weight, in training and in evaluation."""
    for name, layer in lora_layers(model):
        layer.forward = _Forward(layer, grids[name])


class _Forward:
    """The forward pass of one layer. In eval mode the rounded weight is made once; training makes it anew."""

    def __init__(self, layer: Any, grid: Grid) -> None:
        self.layer, self.grid = layer, grid
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        layer = self.layer
        (adapter,) = layer.active_adapters
        a, b, scale = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
        if layer.training:
            self.kept = None
        weight = self.kept
        if weight is None:
            with torch.no_grad():
                weight = self.grid.rounded(base_weight(layer.base_layer).addmm_(b.float(), a.float(), alpha=scale)).to(
                    x.dtype
                )
            if not layer.training:
                self.kept = weight
        y = RoundedLinear.apply(x, a, b, weight, scale)
        bias = layer.base_layer.bias
        return y if bias is None else y + bias.to(y.dtype)


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name as in the plain model, layer) of every linear layer with a LoRA adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name.removeprefix("base_model.model."), module


def grids_of(
    model: Any, *, bits: int, block: int, weight_of: WeightOf | None = None, on_progress: OnProgress = silent
) -> dict[str, Grid]:
    """A grid for every adapted layer.

    weight_of: layer name → its weight before it was held in 4 bits, or None where there is none. A grid found for that
    weight undoes half the noise of NF4, since most rounded values return to where the file had them: loss of SmolLM2 on
    review sentences 3.61 (bf16), 3.82 (NF4), 3.99 (int4 grid of the NF4 weights), 3.81 (int4 grid of the file's weights).
    """
    layers = list(lora_layers(model))
    found = {}
    for number, (name, layer) in enumerate(layers):
        on_progress(Progress("find the grid", number, len(layers), "matrices"))
        weight = weight_of(name) if weight_of is not None else None
        found[name] = Grid.of(base_weight(layer.base_layer) if weight is None else weight, bits=bits, block=block)
    return found
