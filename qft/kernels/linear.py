"""Linear layers, what learns in them and beside them: several that read the same input go through as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qft.kernels.norm import widened
from qft.quant.linear import ByWeight


@dataclass(frozen=True)
class Adapted:
    """A frozen linear layer and the LoRA adapter beside it, if it has one: y = W x + bias + scaling · B A x.

    base: torch's Linear, bitsandbytes' Linear4bit, or a ByWeight, in which something learns and which has no adapter beside it.
    a: float (r, in) and b: float (out, r), the parameters that learn.
    """

    base: Any
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in), out of 4 bits if it is held in these: 0.1 ms for a million weights, so it is done anew for every pass."""
        if isinstance(self.base, ByWeight):
            return self.base.dense(dtype)
        weight, state = self.base.weight, getattr(self.base.weight, "quant_state", None)
        if state is None:
            return weight.detach().to(dtype)
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, state).to(dtype)


class Group:
    """Linear layers that read the same input; their outputs lie side by side."""

    def __init__(self, layers: Sequence[Adapted]) -> None:
        self.layers = list(layers)
        self.widths = [layer.base.out_features for layer in layers]
        self.adapted = [layer for layer in layers if layer.a is not None]
        self.by_weight = [layer.base for layer in layers if isinstance(layer.base, ByWeight)]
        self.parameters = [p for layer in self.adapted for p in (layer.a, layer.b) if p is not None]
        self.parameters += [p for base in self.by_weight for p in base.learning]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: (tokens, in) → y (tokens, sum of outs), and A x (tokens, sum of ranks), which `backward` asks for."""
        y = x @ self._weight(x.dtype).t()
        bias = self._bias(x)
        if bias is not None:
            y += bias
        if not self.adapted:
            return y, None
        a, b = self._adapters(x.dtype)
        ax = x @ a.t()
        return y.addmm_(ax, b.t()), ax

    def backward(self, dy: Tensor, x: Tensor, ax: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """dy: (tokens, sum of outs) → dx (tokens, in), and the gradients of `parameters`, float32 or wider."""
        dx = dy @ self._weight(dy.dtype)
        if self.by_weight:
            parts = zip(self.by_weight, dy.split(self.widths, 1), strict=True)
            return dx, [gradient for base, part in parts for gradient in base.gradients(part, x)]
        if ax is None:
            return dx, []
        a, b = self._adapters(dy.dtype)
        through = dy @ b
        dx.addmm_(through, a)
        da, db = widened(through.t() @ x), widened(dy.t() @ ax)
        found: list[Tensor] = []
        for layer, rows, outs in zip(self.adapted, *self._spans(), strict=True):
            found += [da[rows], db[outs, rows] * layer.scaling]
        return dx, found

    def _weight(self, dtype: torch.dtype) -> Tensor:
        weights = [layer.weight(dtype) for layer in self.layers]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def _bias(self, x: Tensor) -> Tensor | None:
        given = [layer.base.bias for layer in self.layers]
        if all(bias is None for bias in given):
            return None
        parts = [
            x.new_zeros(w) if b is None else b.detach().to(x.dtype) for b, w in zip(given, self.widths, strict=True)
        ]
        return torch.cat(parts)

    def _adapters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All A below each other (ranks, in); all B, scaled, along the diagonal of (outs, ranks), so that one product does."""
        a = torch.cat([layer.a.detach() for layer in self.adapted if layer.a is not None]).to(dtype)
        b = a.new_zeros(sum(self.widths), len(a))
        for layer, rows, outs in zip(self.adapted, *self._spans(), strict=True):
            assert layer.b is not None
            b[outs, rows] = (layer.b.detach() * layer.scaling).to(dtype)
        return a, b

    def _spans(self) -> tuple[list[slice], list[slice]]:
        """Of each adapter: its rows of A, and its layer's outputs."""
        rows, outs, rank, out = [], [], 0, 0
        for layer, width in zip(self.layers, self.widths, strict=True):
            if layer.a is not None:
                rows.append(slice(rank, rank + len(layer.a)))
                outs.append(slice(out, out + width))
                rank += len(layer.a)
            out += width
        return rows, outs
