"""What of a model learns, and how that is kept beside the base: an adapter, the head over labels, or every weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save

from qft.base_model import HEAD_PARTS
from qft.device import compute_type
from qft.errors import InputError
from qft.files import write_bytes
from qft.training.lora import as_plain

_FILE = "learnt.safetensors"
_HEADS = HEAD_PARTS - {"pooler"}  # that belongs to the base


class Method(Protocol):
    """A way of tuning: `qft.training.lora.Lora` is another."""

    def attach(self, model: Any) -> Any:
        """The model with what learns requiring gradients, in float32, and nothing else."""

    def save(self, model: Any, folder: Path) -> None:
        """Keep what was learnt."""

    def merge(self, model: Any, folder: Path) -> Any:
        """A float base with what was learnt in it, of the base's own type."""


@dataclass(frozen=True)
class Weights:
    """Weights of the model itself learn: all, or (head_only) those of the head over labels, the rest frozen as it is.

    compute_dtype: what products are computed in while every weight learns, see `qft.device.compute_type`; the weights
    themselves stay float32, because bfloat16 swallows updates smaller than 1/256 of a weight.
    """

    head_only: bool
    compute_dtype: str

    def attach(self, model: Any) -> Any:
        """Raises InputError if only a head should learn and the model has none."""
        # What a model itself holds fixed stays so: Marian's positions are a formula, and are not saved.
        free = {id(p) for p in model.parameters() if p.requires_grad}
        learns = free if not self.head_only else _head_parameters(model)
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in learns)
        if not self.head_only and (dtype := compute_type(self.compute_dtype, model.device.type)) != torch.float32:
            model.forward = torch.autocast(model.device.type, dtype)(model.forward)
        return model

    def save(self, model: Any, folder: Path) -> None:
        """The learnt values, float32, by their names in the model; tied ones once."""
        learnt = {name: p.detach().float().cpu() for name, p in model.named_parameters() if p.requires_grad}
        write_bytes(folder / _FILE, save(learnt))

    def merge(self, model: Any, folder: Path) -> Any:
        """The learnt values take the place of the base's."""
        there = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in load_file(folder / _FILE).items():
                there[name].copy_(value)
        return as_plain(model)


def _head_parameters(model: Any) -> set[int]:
    found = {id(p) for name, p in model.named_parameters() if not _HEADS.isdisjoint(name.split("."))}
    if not found:
        raise InputError(
            "this task's model has no head of its own that could learn alone",
            where="tuning.method",
            hint="write lora or full",
        )
    return found
