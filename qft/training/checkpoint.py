"""The state a run can go on from, in safetensors: adapter, optimizer, random numbers, where it stood."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qft.files import file_aside

# What an optimizer keeps of a parameter: torch's AdamW, and bitsandbytes' in 8 bits.
_STATE = ("step", "exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")


@dataclass(frozen=True)
class Position:
    """Where a run stood: optimizer steps done, tokens seen, seconds trained, best validation so far.

    loss_scale: of float16's gradients, 1 where they need none.
    """

    step: int
    tokens: int
    seconds: float
    best_loss: float
    best_step: int
    loss_scale: float = 1.0


def save_checkpoint(
    path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: Any, position: Position, plan: str
) -> None:
    """Write the whole state; `plan` is a hash of what must be equal for the run to go on."""
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach().cpu()
        for key, value in optimizer.state.get(parameter, {}).items():
            value = value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)
            tensors[f"{key}.{name}"] = value.clone() if key.startswith("qmap") else value  # one table for all of them
    with file_aside(path) as aside:
        save_file(tensors, aside, {"position": json.dumps(asdict(position)), "plan": plan})


def load_checkpoint(
    path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: Any, plan: str
) -> Position | None:
    """Put a saved state back; None if there is none, or if it is of another plan or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            if meta.get("plan") != plan:
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError:
        return None
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"parameter.{name}"])
        state = {key: tensors[f"{key}.{name}"] for key in _STATE if f"{key}.{name}" in tensors}
        if state:
            optimizer.state[parameter] = {key: _put_back(key, v, parameter, optimizer) for key, v in state.items()}
    torch.set_rng_state(tensors["rng"])
    return Position(**json.loads(meta["position"]))


def _put_back(key: str, value: Tensor, parameter: Tensor, optimizer: Any) -> Any:
    """bitsandbytes counts steps in an int, torch in a tensor that stays on the processor.

    bitsandbytes makes its own room for the averages: a paged optimizer's, which may leave the card, is no plain tensor.
    """
    if key == "step":
        return value if value.is_floating_point() else int(value)
    if key in ("state1", "state2"):
        return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)


def save_parameters(path: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """The learnt values alone."""
    with file_aside(path) as aside:
        save_file({name: p.detach().cpu() for name, p in parameters.items()}, aside)


def load_parameters(path: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Undo `save_parameters`."""
    with safe_open(path, "pt") as file:
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(name))
