"""Rounding that makes up for its own errors, in the layer's output on real inputs.

Three steps, all on one quadratic form, ‖X (W - Q)ᵀ‖² = tr (W - Q) H (W - Q)ᵀ with H = Xᵀ X:
`quantize_gptq` rounds column by column, the error of each taken up by those still to come (GPTQ, arXiv 2210.17323), columns with the
largest inputs first, while errors are cheap to take up. Scales are found before, so blocks stay blocks of neighbours whatever the
order: MatMulNBits needs no g_idx, which would leave its packed kernel.
`revisit` rounds every column again, now that all others are known (coordinate descent, as QuantEase, arXiv 2309.01885).
`refit_scales` gives each block the scale that is best for its codes.
On SmolLM2's layers in blocks of 64 the order takes 2 to 18 % off the error of GPTQ from left to right, a visit up to 5 % more, the
next one 1 to 2 %; scales found for the error that is left of a column's, not for its input, 2 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qft.quant.grids import Quantized, Scheme, dequantize, find_scales, to_blocks

_DAMPING = 0.01  # share of the mean diagonal added to the Hessian, as in the paper
_CHUNK = 64  # columns whose errors reach the others in one product


def quantize_gptq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> tuple[Quantized, Tensor]:
    """Round `weight`, float (rows, cols), so that its product with typical inputs changes least.

    hessian: float (cols, cols), the sum of x xᵀ over the layer's inputs x; columns that were never fed are rounded as if fed
    on their own. Returns also float32 (rows, cols), every column as it was when its turn came: its nearest codes are the codes.
    """
    rows, cols = weight.shape
    damped = _damped(hessian)
    order = torch.argsort(damped.diagonal(), descending=True)
    factor = _inverse_factor(damped[order][:, order])
    importance = torch.empty(1, cols, device=weight.device)
    importance[0, order] = factor.diagonal() ** -2  # what remains of an error that later columns take up
    scales, zeros = find_scales(to_blocks(weight, scheme.block), scheme, to_blocks(importance, scheme.block))
    left = weight.t().float()[order]  # a column of the weight is contiguous
    codes = torch.empty(cols, rows, dtype=torch.uint8, device=weight.device)
    grid = _Columns(scales, zeros, scheme)
    for start in range(0, cols, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        part, own = left[chunk], factor[chunk, chunk]
        errors = torch.empty_like(part)
        for j, column in enumerate(order[chunk].tolist()):
            codes[column], value = grid.round(part[j], column)
            errors[j] = (part[j] - value) / own[j, j]
            part[j + 1 :] -= own[j, j + 1 :, None] * errors[j]
        left[chunk.stop :].addmm_(factor[chunk, chunk.stop :].t(), errors, alpha=-1)
    latent = torch.empty_like(left)
    latent[order] = left
    return grid.matrix(codes), latent.t().contiguous()


def revisit(weight: Tensor, matrix: Quantized, hessian: Tensor) -> tuple[Quantized, Tensor]:
    """Every column's best code, all other columns as they now are; the error never grows. Returns as `quantize_gptq`."""
    damped = _damped(hessian).float()
    own = damped.diagonal().tolist()
    values = dequantize(matrix).t().contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8, device=weight.device)
    slope = damped @ (values - weight.t().float())  # half the error's gradient
    grid = _Columns(matrix.scales, matrix.zero_points, matrix.scheme)
    for start in range(0, len(values), _CHUNK):
        chunk = slice(start, min(start + _CHUNK, len(values)))
        near, moved = slope[chunk].clone(), torch.empty_like(values[chunk])
        for j, column in enumerate(range(chunk.start, chunk.stop)):
            was, values[column] = values[column].clone(), values[column] - near[j] / own[column]
            codes[column], value = grid.round(values[column], column)
            moved[j] = value - was
            near.addr_(damped[chunk, column], moved[j])
        slope.addmm_(damped[:, chunk], moved)
    return grid.matrix(codes), values.t().contiguous()


class _Columns:
    """A grid whose columns are rounded in any order."""

    def __init__(self, scales: Tensor, zeros: Tensor, scheme: Scheme) -> None:
        self.scales, self.zeros, self.scheme = scales, zeros, scheme
        self.steps, self.shifts = scales.t().float().contiguous(), zeros.t().float().contiguous()

    def round(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """float (rows,) → codes as uint8 and the values they stand for."""
        step, shift = self.steps[column // self.scheme.block], self.shifts[column // self.scheme.block]
        code = torch.round(values / step).add_(shift).clamp_(0, self.scheme.top)
        return code.to(torch.uint8), (code - shift).mul_(step)

    def matrix(self, codes: Tensor) -> Quantized:
        """codes: uint8 (cols, rows)."""
        (cols, rows), block = codes.shape, self.scheme.block
        whole = self.zeros.t()[:, None].repeat(1, block, 1).reshape(-1, rows)  # padded columns stand for zero
        whole[:cols] = codes
        return Quantized(whole.t().reshape(rows, -1, block).contiguous(), self.scales, self.zeros, cols, self.scheme)


def _damped(hessian: Tensor) -> Tensor:
    """float64 (cols, cols)."""
    damped = hessian.double()
    damped = damped.clone() if damped is hessian else damped
    damped.diagonal().add_(max(_DAMPING * float(damped.diagonal().mean()), 1e-8))
    return damped


def _inverse_factor(damped: Tensor) -> Tensor:
    """float32 (cols, cols): the upper Cholesky factor U of the inverse, Uᵀ U, in float64 on the way.

    With its rows and columns in reverse order the matrix is L Lᵀ; the inverse of L, put back into order, is U.
    """
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    inverse = torch.linalg.solve_triangular(
        lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
    )
    return inverse.flip(0, 1).float()


def refit_scales(weight: Tensor, matrix: Quantized, hessian: Tensor) -> Tensor:
    """float32 (rows, k_blocks): factors of the scales that change the layer's outputs least, the codes given.

    For each row the factors g minimise (w - Q g)ᵀ H (w - Q g), Q's column k being the row's values in block k: one linear
    system of k_blocks unknowns a row.
    """
    rows, block = len(weight), matrix.scheme.block
    values = torch.nn.functional.pad(dequantize(matrix), (0, -matrix.cols % block))
    error = torch.nn.functional.pad(weight.float() - dequantize(matrix), (0, -matrix.cols % block))
    damped = torch.nn.functional.pad(_damped(hessian).float(), (0, -matrix.cols % block, 0, -matrix.cols % block))
    blocks = values.shape[1] // block
    right = (values * (error @ damped)).view(rows, blocks, block).sum(-1)
    system = torch.empty(rows, blocks, blocks, device=weight.device)
    for k in range(blocks):
        start = k * block
        met = values[:, start : start + block] @ damped[start : start + block, start:]
        system[:, k, k:] = system[:, k:, k] = met.mul_(values[:, start:]).view(rows, blocks - k, block).sum(-1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-3 * diagonal.mean(-1, keepdim=True) + 1e-12)  # a block of zeros alone stays as it is
    return 1 + torch.linalg.solve(system, right[..., None])[..., 0].clamp(-0.5, 0.5)
