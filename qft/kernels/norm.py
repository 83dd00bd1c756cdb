"""Root mean square norms (arXiv 1910.07467) and rotary positions (arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """y = x / sqrt(mean(x²) + eps) · gain over the last dimension, formed in float32 or wider. gain: float32, frozen."""

    gain: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → the same shape and type."""
        wide = widened(x)
        return wide.mul(self._inverse(wide)).mul_(self.gain).to(x.dtype)

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """dy and x: (…, width) → dx, of x's type."""
        wide = widened(x)
        inverse = self._inverse(wide)
        normal, dy = wide.mul(inverse), widened(dy).mul(self.gain)
        along = (dy * normal).mean(-1, keepdim=True)
        return dy.sub_(normal.mul_(along)).mul_(inverse).to(x.dtype)

    def _inverse(self, wide: Tensor) -> Tensor:
        return torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)


def widened(x: Tensor) -> Tensor:
    """As float32, or wider if it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head by its token's angles. x: (tokens, heads, width); cos, sin: (tokens, 1, width / 2).

    With -sin it is undone, which is its backward pass, too.
    """
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
