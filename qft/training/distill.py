"""Learning from the tuned model what rounding took: KL divergence to its answers, kept as top-k and rest."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qft.kernels.loss import Said, log_rest, top_divergence
from qft.measure.agreement import TOP


@dataclass(frozen=True)
class Teacher:
    """What the tuned model says at every position of some rows.

    ids: int32 and log_p: float16 (positions, TOP); rest: float16 (positions,), the log of all other tokens' share.
    starts: first position of each row, by what the row is known by. 392 bytes a position instead of 196,608 for 49,152 float32 logits.
    """

    ids: Tensor
    log_p: Tensor
    rest: Tensor
    starts: dict[Hashable, int]

    def said(self, row: Hashable, positions: slice, device: Any) -> Said:
        """At some of a row's positions."""
        start = self.starts[row]
        span = slice(start + positions.start, start + positions.stop)
        ids, log_p, rest = (t[span].to(device) for t in (self.ids, self.log_p, self.rest))
        return Said(ids.long(), log_p.float(), rest.float())


def teach(said: Iterable[tuple[Hashable, Tensor]]) -> Teacher:
    """Keep what a model said. said: pairs of what a row is known by and its logits (positions, vocabulary), or the next of them."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    starts: dict[Hashable, int] = {}
    position = 0
    for row, logits in said:
        log_p, ids = torch.log_softmax(logits.float(), -1).topk(min(TOP, logits.shape[-1]), dim=-1)
        parts.append((ids.int().cpu(), log_p.half().cpu(), log_rest(log_p).half().cpu()))
        starts.setdefault(row, position)
        position += len(logits)
    ids, log_p, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return Teacher(ids, log_p, rest, starts)


class TopDivergence(torch.autograd.Function):
    """`top_divergence` as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, said: Said) -> Tensor:
        """logits: float (positions, vocabulary). Returns nats (positions,)."""
        divergence, gradient = top_divergence(logits, said)
        ctx.save_for_backward(gradient)
        return divergence

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Gradient of the logits alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None], None
