"""Grids on disk: the safetensors file beside an adapter that was trained on them."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from qft.files import write_bytes
from qft.quant.linear import Grid

NAME = "grid.safetensors"


def save_grids(path: Path, grids: dict[str, Grid]) -> None:
    """Scales and zero points by layer name; bits and block in the file's metadata, the same for all layers."""
    one = next(iter(grids.values()))
    tensors = {f"{name}.scales": grid.scales for name, grid in grids.items()}
    tensors |= {f"{name}.zero_points": grid.zero_points for name, grid in grids.items()}
    write_bytes(
        path,
        save({k: t.contiguous().cpu() for k, t in tensors.items()}, {"bits": str(one.bits), "block": str(one.block)}),
    )


def load_grids(path: Path) -> dict[str, Grid]:
    """Undo `save_grids`; empty if the adapter was not trained on a grid."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        bits, block = (int(file.metadata()[key]) for key in ("bits", "block"))
        names = [key.removesuffix(".scales") for key in file.keys() if key.endswith(".scales")]  # noqa: SIM118 - not a dict
        return {
            n: Grid(file.get_tensor(f"{n}.scales"), file.get_tensor(f"{n}.zero_points"), bits, block) for n in names
        }
