"""What rounding would hurt: one pass back over rows tells which inputs of a layer count, and which layers need a finer grid.

A layer's weights moved by D move the model's distribution by KL = ½ dᵀ F d, d being D's entries and F the layer's Fisher
information, E[v vᵀ] over gradients v of log p(y) with y drawn from the model itself (Amari 1998; arXiv 1905.12558 on why the
answers must be the model's own). At a position with input x and gradient g of the layer's output v is g xᵀ. Two things follow:

- An error of the output counts by how much the answers hang on it. GPTQ's Hessian Σ x xᵀ takes all positions for equal; weighted
  with |g| (GuidedQuant, arXiv 2505.07004, weighs with |g|²) fitting on 16,384 tokens leaves 0.0282 or 0.0298 nats (two draws of
  answers) instead of 0.0320 on SmolLM2 in blocks of 64; |g|² leaves 0.0292, and on half of the tokens, where a few positions then
  decide, 0.0350.
- Rounding errors that know nothing of each other, of variance step²/12, cost ½ Σ step²/12 · g² x². That compares grids before
  anything is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qft.data.encode import EncodedRow
from qft.measure.quality import batches
from qft.progress import OnProgress, Progress, silent
from qft.quant.fit import decoder_linears
from qft.quant.grids import Scheme, in_blocks, scale_and_zero, to_blocks
from qft.quant.linear import ByWeight
from qft.training.forward import Forward

_ROWS, _TOKENS = 8, 1024  # at once: what fills rows up has no gradient, so it is not felt


@dataclass(frozen=True)
class Felt:
    """What a layer's inputs x and the gradients g of its outputs come to, summed over positions.

    hessian: float32 (cols, cols), |g| x xᵀ; layers that read the same input share one, their |g| added.
    squares: float32 (rows, k_blocks), g² of an output times the sum of x² over a block's inputs.
    """

    hessian: Tensor
    squares: Tensor


def feel(
    model: Any,
    rows: Sequence[EncodedRow],
    block: int,
    *,
    forward: Forward,
    seed: int,
    on_progress: OnProgress = silent,
) -> dict[str, Felt]:
    """Every linear layer of the decoder by name, felt on rows with answers drawn from the model; afterwards the model is frozen.

    block: of `Felt.squares`. Memory: 4 · cols² bytes an input, 0.4 GB for SmolLM2-135M.
    """
    chance = torch.Generator().manual_seed(seed)
    model.eval()
    with watched(model, block) as felt:
        done, together = 0, 1 if any(hasattr(row, "source") for row in rows) else _ROWS  # a clip's state may be large
        for batch in batches([len(row.input_ids) for row in rows], together, _TOKENS):
            on_progress(Progress("find what rounding hurts", done, len(rows), "rows"))
            forward.drawn_log_p(model, [rows[i] for i in batch], chance).backward()
            done += len(batch)
    return felt


def expected_divergence(weight: Tensor, felt: Felt, block: int, scheme: Scheme) -> float:
    """Nats, summed over positions, that rounding a weight to the nearest of a grid costs, if its errors know nothing of each other.

    block: of `felt`, which `scheme.block` is a multiple of. Fitting takes off about the same share on every grid.
    """
    blocks = to_blocks(weight, scheme.block)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    steps, _ = scale_and_zero(low, high, scheme)
    squares = in_blocks(felt.squares, scheme.block // block).sum(-1)
    return float((steps.float().square() * squares * (high > low)).sum() / 24)  # a block of zeros stays exact


def choose_grids(
    hurt: Mapping[str, Mapping[Scheme, float]], shapes: Mapping[str, tuple[int, int]], most_bits: float
) -> dict[str, Scheme]:
    """Every layer's grid: from the smallest on, the step that takes off most divergence for a byte more, while the bits last.

    hurt: layer name → divergence on each grid it may lie on. shapes: layer name → (rows, cols). most_bits: a weight, on the mean.
    """
    stored = {(name, scheme): scheme.stored_bytes(*shapes[name]) for name, grids in hurt.items() for scheme in grids}
    chosen = {name: min(grids, key=lambda scheme: stored[name, scheme]) for name, grids in hurt.items()}
    left = most_bits / 8 * sum(rows * cols for rows, cols in shapes.values())
    left -= sum(stored[pair] for pair in chosen.items())
    while True:
        steps = []
        for name, now in chosen.items():
            for scheme, divergence in hurt[name].items():
                more, gain = stored[name, scheme] - stored[name, now], hurt[name][now] - divergence
                if gain > 0 and 0 < more <= left:
                    steps.append((gain / more, name, scheme, more))
        if not steps:
            return chosen
        _, name, scheme, more = max(steps, key=lambda step: step[0])
        chosen[name] = scheme
        left -= more


@contextmanager
def watched(model: Any, block: int) -> Iterator[dict[str, Felt]]:
    """While the block runs, every backward pass is felt by all linear layers of the decoder; the model is frozen from here on.

    Layer name → what it felt, filled in at the end. block: of `Felt.squares`.
    """
    model.requires_grad_(False)
    linears, inputs, felt = decoder_linears(model), _Inputs(), dict[str, Felt]()
    layers = {name: _Watched(linear, block, inputs) for name, linear in linears.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    try:
        yield felt
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
    inputs.form()
    felt |= {name: Felt(layer.hessian, layer.squares) for name, layer in layers.items()}
    for hessian in {id(each.hessian): each.hessian for each in felt.values()}.values():
        hessian /= hessian.diagonal().mean().clamp(min=1e-30)  # gradients are of any size, damping is not


class _Watched(ByWeight):
    """A frozen linear layer that feels what passes back; a parameter that never moves makes autograd come by."""

    def __init__(self, linear: torch.nn.Linear, block: int, inputs: _Inputs) -> None:
        super().__init__(linear.out_features, linear.in_features, linear.bias)
        rows, cols, device = linear.out_features, linear.in_features, linear.weight.device
        self.linear, self.block, self.inputs = linear, block, inputs
        self.still = torch.nn.Parameter(torch.zeros((), device=device))
        self.squares = torch.zeros(rows, -(-cols // block), device=device)
        self.sum: Tensor | None = None

    @property
    def hessian(self) -> Tensor:
        """Zeros if nothing ever came by."""
        size, device = self.in_features, self.squares.device
        return torch.zeros(size, size, device=device) if self.sum is None else self.sum

    @property
    def learning(self) -> list[Tensor]:
        """What never moves."""
        return [self.still]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """As it was."""
        return self.linear.weight.detach().to(dtype)

    def gradients(self, dy: Tensor, x: Tensor) -> list[Tensor]:
        """Zero."""
        squares = dy.float().square()
        self.squares.addmm_(squares.t(), to_blocks(x, self.block).square().sum(-1))
        self.sum = self.inputs.add(x, squares.sum(-1).sqrt(), self.sum)
        return [torch.zeros_like(self.still)]


class _Inputs:
    """Sums of |g| x xᵀ. Layers that read one input come by one after another: their |g| add up, and the product is formed once."""

    def __init__(self) -> None:
        self.x, self.strength, self.sum = torch.zeros(0), torch.zeros(0), torch.zeros(0)

    def add(self, x: Tensor, strength: Tensor, known: Tensor | None) -> Tensor:
        """x: (positions, cols); strength: float32 (positions,), |g|; known: the layer's sum so far. Returns the layer's sum."""
        if x.data_ptr() == self.x.data_ptr() and x.shape == self.x.shape:
            self.strength = self.strength + strength
            return self.sum
        self.form()
        self.x, self.strength = x, strength
        self.sum = torch.zeros(x.shape[1], x.shape[1], device=x.device) if known is None else known
        return self.sum

    def form(self) -> None:
        """Add the product that is still to be formed."""
        if self.x.numel():
            x = self.x.float() * self.strength.sqrt()[:, None]
            with _coarse_products():
                self.sum.addmm_(x.t(), x)
        self.x = torch.zeros(0)


@contextmanager
def _coarse_products() -> Iterator[None]:
    """Factors of 8 bits may be multiplied where that is faster, and summed in 32: the product of a matrix with itself stays definite.

    Rounding's own products stay exact.
    """
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was)
