"""What a kind of task must say about its rows and its model, so that one loop tunes and one fold ships all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qft.progress import OnProgress


@dataclass(frozen=True)
class Validation:
    """loss: mean cross entropy a target, nats. right_percent: targets that are the first choice.

    row_nats: cross entropy of each row, summed over its targets.
    """

    loss: float
    right_percent: float
    row_nats: list[float]


class Forward(Protocol):
    """How rows go through a model. A teacher is whatever `ask` returns and `divergence` takes."""

    def start(
        self, model: Any, rows: Sequence[Any], validation: Sequence[Any], *, batch_size: int, on_progress: OnProgress
    ) -> bool:
        """Fit what is new in a model, adapter and all, before the first step; whether there was anything."""

    def loss(self, model: Any, rows: Sequence[Any], *, label_smoothing: float = 0.0) -> Tensor:
        """Cross entropy summed over the rows' targets, float32.

        label_smoothing: share of each target's probability that is spread over all choices (arXiv 1512.00567, section 7).
        """

    def validate(self, model: Any, rows: Sequence[Any], batch_size: int) -> Validation:
        """Loss and right answers on held-out rows; leaves the model in training mode."""

    def feed(self, model: Any, row: Any) -> Tensor:
        """Logits of one row alone, without padding, for whoever watches the model's layers meanwhile."""

    def ask(self, model: Any, rows: Sequence[Any], *, on_progress: OnProgress) -> Any:
        """What the model says about every row, each fed alone as in `feed`."""

    def divergence(self, model: Any, rows: Sequence[Any], teacher: Any) -> Tensor:
        """KL(teacher ‖ model) summed over rows, each weighing as many nats as it has targets, float32."""

    def drawn_log_p(self, model: Any, rows: Sequence[Any], chance: torch.Generator) -> Tensor:
        """Log probability of answers drawn from the model itself, summed over rows and positions."""
