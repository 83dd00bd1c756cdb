"""Matrices on a grid in a safetensors file: codes packed as the graph has them, scales, zero points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qft.files import file_aside
from qft.quant.grids import Quantized, Scheme, pack, unpack


def save_matrices(path: Path, matrices: dict[str, Quantized]) -> None:
    """Every matrix under its layer's name; their schemes stand in the file's metadata."""
    tensors: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        tensors[f"{name}.codes"] = pack(matrix.codes, matrix.scheme.bits)
        tensors[f"{name}.scales"] = matrix.scales
        tensors[f"{name}.zero_points"] = pack(matrix.zero_points, matrix.scheme.bits)
    about = {name: json.dumps({"cols": m.cols, **_as_words(m.scheme)}) for name, m in matrices.items()}
    with file_aside(path) as aside:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, aside, about)


def load_matrices(path: Path) -> dict[str, Quantized]:
    """Undo `save_matrices`."""
    with safe_open(path, "pt") as file:
        return {name: _read(file, name, json.loads(words)) for name, words in file.metadata().items()}


def _as_words(scheme: Scheme) -> dict[str, Any]:
    return {**vars(scheme), "scale_type": str(scheme.scale_type).removeprefix("torch.")}


def _read(file: safe_open, name: str, words: dict[str, Any]) -> Quantized:
    cols = words.pop("cols")
    scheme = Scheme(**{**words, "scale_type": getattr(torch, words["scale_type"])})
    codes, scales, zeros = (file.get_tensor(f"{name}.{part}") for part in ("codes", "scales", "zero_points"))
    return Quantized(
        unpack(codes, scheme.bits, scheme.block), scales, unpack(zeros, scheme.bits, scales.shape[1]), cols, scheme
    )
