"""How large a model's activations get: what float16 must hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Row = TypeVar("Row")

FLAGGED = 1e4  # float16 ends at 65,504, and its steps are 8 from here on


@torch.no_grad()
def large_activations(model: Any, rows: Sequence[Row], feed: Callable[[Any, Row], Any]) -> dict[str, float]:
    """Module → its largest output, if that is above 10,000 on some row. feed: see `qft.training.forward.Forward`.

    What is inside a module is not seen: squares in norms, which float16 graphs keep in float32 in any case.
    """
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(_: Any, __: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                    largest[name] = max(largest.get(name, 0.0), tensor.detach().abs().max().item())

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model.eval()
        for row in rows:
            feed(model, row)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value for name, value in largest.items() if not value <= FLAGGED}  # not a number is flagged, too
