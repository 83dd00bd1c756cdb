"""A new layer over labels, fitted on what the frozen model says before anything else learns.

A head that knows nothing pulls the layers below it about while it learns. Fitted first, it starts fine-tuning near the end,
and keeps what the base knew (linear probing, then fine-tuning: arXiv 2202.10054).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the squared weights of scaled inputs, in the mean loss: tried from strong to weak, each from where the last ended.
_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
_ITERATIONS = 60  # of L-BFGS a penalty

Nats = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """What a head gets and what it should say: inputs float32 (rows, hidden), wanted float32 (rows, labels) of 0 and 1."""

    inputs: Tensor
    wanted: Tensor


def fit_linear(train: Seen, validation: Seen, nats: Nats, *, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Weight (labels, hidden) and bias (labels,), zeros if there is none, of a logistic regression.

    nats(logits, wanted): the loss of each row. The penalty is the one with the lowest loss on the validation rows.
    """
    # By size and not by spread: dropout's noise grows with an input's size (arXiv 1307.1493), so this penalty is its own.
    scale = train.inputs.square().mean(0).sqrt().clamp(min=1e-6)
    inputs = train.inputs / scale
    weight = torch.zeros(train.wanted.shape[1], inputs.shape[1], requires_grad=True)
    bias = torch.zeros(train.wanted.shape[1], requires_grad=has_bias)
    best, kept = math.inf, (weight.detach().clone(), bias.detach().clone())
    for penalty in _PENALTIES:
        _descend(lambda: nats(inputs @ weight.T + bias, train.wanted).mean(), weight, bias, penalty)
        with torch.no_grad():
            plain = weight / scale
            loss = float(nats(validation.inputs @ plain.T + bias, validation.wanted).mean())
        if not loss < best:
            break
        best, kept = loss, (plain, bias.detach().clone())
    return kept


def _descend(loss_of: Callable[[], Tensor], weight: Tensor, bias: Tensor, penalty: float) -> None:
    learnt = [tensor for tensor in (weight, bias) if tensor.requires_grad]
    search = torch.optim.LBFGS(learnt, max_iter=_ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = loss_of() + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    search.step(closure)
