"""Matrices on a grid in a safetensors file: codes packed as the graph has them, scales, zero points."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from qft.files import write_bytes
from qft.quant.grids import Quantized, Scheme, pack, unpack


def save_matrices(path: Path, matrices: dict[str, Quantized]) -> None:
    """Every matrix under its layer's name; they share one scheme, which stands in the file's metadata."""
    scheme = next(iter(matrices.values())).scheme
    tensors: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        tensors[f"{name}.codes"] = pack(matrix.codes, scheme.bits)
        tensors[f"{name}.scales"] = matrix.scales
        tensors[f"{name}.zero_points"] = pack(matrix.zero_points, scheme.bits)
        tensors[f"{name}.cols"] = torch.tensor(matrix.cols)
    about = {
        "bits": str(scheme.bits),
        "block": str(scheme.block),
        "symmetric": str(int(scheme.symmetric)),
        "scale_type": str(scheme.scale_type).removeprefix("torch."),
    }
    write_bytes(path, save({name: t.contiguous().cpu() for name, t in tensors.items()}, about))


def load_matrices(path: Path) -> dict[str, Quantized]:
    """Undo `save_matrices`."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
        scheme = Scheme(
            int(about["bits"]),
            int(about["block"]),
            symmetric=about["symmetric"] == "1",
            scale_type=getattr(torch, about["scale_type"]),
        )
        names = [key.removesuffix(".codes") for key in file.keys() if key.endswith(".codes")]  # noqa: SIM118 - not a dict
        return {name: _read(file, name, scheme) for name in names}


def _read(file: safe_open, name: str, scheme: Scheme) -> Quantized:
    codes, scales = file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales")
    return Quantized(
        unpack(codes, scheme.bits, scheme.block),
        scales,
        unpack(file.get_tensor(f"{name}.zero_points"), scheme.bits, scales.shape[1]),
        int(file.get_tensor(f"{name}.cols")),
        scheme,
    )
