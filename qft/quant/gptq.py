"""Rounding that makes up for its own errors: GPTQ (arXiv 2210.17323) on the blocks that ship.

Columns are rounded from left to right; the error each one makes in the layer's output, on real inputs, is taken up by the
columns still to come. Scales and zero points of a block are found when its first column is reached, for the weights as they
then are. Columns keep their order: with `act_order` MatMulNBits would need g_idx, which leaves its packed kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qft.quant.grids import Quantized, Scheme, dequantize, find_scales, round_to

_DAMPING = 0.01  # share of the mean diagonal added to the Hessian, as in the paper


def quantize_gptq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> tuple[Quantized, Tensor]:
    """Round `weight`, float (rows, cols), so that its product with typical inputs changes least.

    hessian: float (cols, cols), the sum of x xᵀ over the layer's inputs x; columns that were never fed are rounded as if fed
    on their own.
    """
    (rows, cols), block = weight.shape, scheme.block
    inverse = _inverse_factor(hessian)
    left = weight.t().float().contiguous().clone()  # a column of the weight is contiguous
    codes = torch.zeros(-(-cols // block) * block, rows, dtype=torch.uint8, device=weight.device)
    grids: list[tuple[Tensor, Tensor]] = []
    for start in range(0, cols, block):
        end = min(start + block, cols)
        part, factor = left[start:end], inverse[start:end, start:end]
        scale, zero = find_scales(part.t(), scheme, importance=factor.diagonal().square().reciprocal())
        errors = torch.empty_like(part)
        for j in range(end - start):
            code = round_to(part[j, :, None], scale, zero, scheme)[:, 0]
            codes[start + j] = code
            errors[j] = (part[j] - (code.float() - zero.float()) * scale.float()) / factor[j, j]
            part[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
        left[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)
        codes[end : start + block] = zero  # padded columns stand for zero
        grids.append((scale, zero))
    scales, zeros = (torch.stack(column, dim=1) for column in zip(*grids, strict=True))
    # `left` now holds every column as it was when its turn came: rounding it to the grid gives the codes.
    return Quantized(
        codes.t().reshape(rows, -1, block).contiguous(), scales, zeros, cols, scheme
    ), left.t().contiguous()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """float32 (cols, cols): the upper Cholesky factor of the damped Hessian's inverse, in float64 on the way."""
    damped = hessian.double().clone()
    damped.diagonal().add_(max(_DAMPING * float(damped.diagonal().mean()), 1e-8))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def refit_scales(weight: Tensor, matrix: Quantized, hessian: Tensor) -> Tensor:
    """float32 (rows, k_blocks): factors of the scales that change the layer's outputs least, the codes given.

    For each row the factors g minimise (w - Q g)ᵀ H (w - Q g), Q's column k being the row's values in block k: one linear
    system of k_blocks unknowns a row.
    """
    rows, block = len(weight), matrix.scheme.block
    values = torch.nn.functional.pad(dequantize(matrix), (0, -matrix.cols % block))
    error = torch.nn.functional.pad(weight.float() - dequantize(matrix), (0, -matrix.cols % block))
    damped = torch.nn.functional.pad(hessian.float(), (0, -matrix.cols % block, 0, -matrix.cols % block))
    damped.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    blocks = values.shape[1] // block
    right = (values * (error @ damped)).view(rows, blocks, block).sum(-1)
    system = torch.empty(rows, blocks, blocks, device=weight.device)
    for k in range(blocks):
        span = slice(k * block, (k + 1) * block)
        system[:, k] = ((values[:, span] @ damped[span]) * values).view(rows, blocks, block).sum(-1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-3 * diagonal.mean(-1, keepdim=True) + 1e-12)  # a block of zeros alone stays as it is
    return 1 + torch.linalg.solve(system, right[..., None])[..., 0].clamp(-0.5, 0.5)
