"""Every layer rounded for the inputs it gets, those counting most that the model's answers hang on: see `qft.training.sensitivity`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qft.progress import OnProgress, Progress, silent
from qft.quant.gptq import quantize_gptq, refit_scales, revisit
from qft.quant.grids import Quantized, Scheme, quantize_nearest

_VISITS = 2


@dataclass(frozen=True)
class Fitted:
    """matrix: codes and the scales they were rounded with. latent: float16 (rows, cols), the weight whose nearest codes these are.

    gain: float32 (rows, k_blocks), what the scales are best multiplied with now that the codes are known.
    """

    matrix: Quantized
    latent: Tensor
    gain: Tensor


def decoder_linears(model: Any) -> dict[str, torch.nn.Linear]:
    """Name → linear layer inside the transformer's layers (its lists of modules): all but embedding and head.

    An encoder-decoder has two lists; of more, the longest are the layers. Lists inside of layers are not looked at.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    wanted = 2 if getattr(model.config, "is_encoder_decoder", False) else 1
    chosen = sorted(outer, key=lambda name: -len(lists[name]))[:wanted]
    return {
        f"{prefix}.{name}": m
        for prefix in chosen
        for name, m in lists[prefix].named_modules()
        if isinstance(m, torch.nn.Linear)
    }


@torch.no_grad()
def fit_rounding(
    model: Any, hessians: dict[str, Tensor], schemes: Mapping[str, Scheme], *, on_progress: OnProgress = silent
) -> dict[str, Fitted]:
    """Round the layers named in `schemes`, each on its grid; the model stays as it is. hessians: float32 (cols, cols) by layer.

    Layers of one input and one grid (query, key and value; gate and up) are rounded as one matrix: they share the inverse.
    """
    linears = decoder_linears(model)
    groups: dict[tuple[int, Scheme], list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault((id(hessians[name]), scheme), []).append(name)
    found: dict[str, Fitted] = {}
    for (_, scheme), names in groups.items():
        on_progress(Progress("fit the rounding", len(found), len(schemes), "matrices"))
        hessian, weights = hessians[names[0]], [linears[name].weight.float() for name in names]
        whole = torch.cat(weights)
        matrix, latent, gain = _fit_matrix(whole, hessian, scheme)
        start = 0
        for name, weight in zip(names, weights, strict=True):
            rows = slice(start, start + len(weight))
            found[name] = Fitted(matrix.rows(rows), latent[rows].half(), gain[rows])
            start = rows.stop
    return found


def _fit_matrix(weight: Tensor, hessian: Tensor, scheme: Scheme) -> tuple[Quantized, Tensor, Tensor]:
    """Matrix, latent and gain. Codes and scales are made best for each other by turns; 8 bits need no fitting."""
    if scheme.bits == 8:
        matrix = quantize_nearest(weight, scheme)
        return matrix, weight, torch.ones_like(matrix.scales, dtype=torch.float32)
    matrix, latent = quantize_gptq(weight, hessian, scheme)
    for _ in range(_VISITS):
        scales = matrix.scales * refit_scales(weight, matrix, hessian)
        matrix, latent = revisit(weight, replace(matrix, scales=scales.to(scheme.scale_type)), hessian)
    return matrix, latent, refit_scales(weight, matrix, hessian)
