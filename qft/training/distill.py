"""Learning from the tuned model what rounding took: KL divergence to its answers, kept as top-k and rest."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    def said(self, row: Hashable, positions: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
        """ids, int64, log_p and rest, float32, at a row's first positions."""
        span = slice(self.starts[row], self.starts[row] + positions)
        ids, log_p, rest = (t[span].to(device) for t in (self.ids, self.log_p, self.rest))
        return ids.long(), log_p.float(), rest.float()


def teach(said: Iterable[tuple[Hashable, Tensor]]) -> Teacher:
    """Keep what a model said. said: pairs of what a row is known by and its logits (positions, vocabulary)."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    starts: dict[Hashable, int] = {}
    position = 0
    for row, logits in said:
        log_p, ids = torch.log_softmax(logits.float(), -1).topk(min(TOP, logits.shape[-1]), dim=-1)
        parts.append((ids.int().cpu(), log_p.half().cpu(), log_rest(log_p).half().cpu()))
        starts[row] = position
        position += len(logits)
    ids, log_p, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return Teacher(ids, log_p, rest, starts)


def log_rest(log_p: Tensor) -> Tensor:
    """Log of what is left of one; never less than -16, so that nothing is infinite."""
    return torch.log1p(-log_p.exp().sum(-1).clamp(max=1 - 1e-7))


class TopDivergence(torch.autograd.Function):
    """KL(teacher ‖ student) over the teacher's likeliest tokens and one class for the rest."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, log_p: Tensor, rest: Tensor) -> Tensor:
        """logits: float (positions, vocabulary); ids: int64, log_p: float (positions, k); rest: float (positions,).

        Returns nats (positions,). The gradient is formed here, in the memory of the softmax.
        """
        log_q = torch.log_softmax(logits, -1)
        ours = log_q.gather(-1, ids)
        ours_rest = log_rest(ours)
        p, p_rest = log_p.exp(), rest.exp()
        divergence = (p * (log_p - ours)).sum(-1) + p_rest * (rest - ours_rest)
        # d/d log_q of each kept token: its own term, and that the rest is one minus their sum.
        of_kept = p_rest[:, None] * (ours - ours_rest[:, None]).exp() - p
        gradient = log_q.exp_().mul_(-of_kept.sum(-1, keepdim=True)).scatter_add_(-1, ids, of_kept)
        ctx.save_for_backward(gradient)
        return divergence

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Gradient of the logits alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None], None, None, None
