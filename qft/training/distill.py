"""Learning from the tuned model what rounding took: KL divergence to its answers, kept as top-k and rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qft.data.encode import Encoded
from qft.measure.agreement import TOP
from qft.measure.quality import batches
from qft.progress import OnProgress, Progress, silent
from qft.training.runner import prefill


@dataclass(frozen=True)
class Teacher:
    """What the tuned model says at every position of some rows.

    ids: int32 and log_p: float16 (positions, TOP); rest: float16 (positions,), the log of all other tokens' share.
    starts: first position of each row. 392 bytes a position instead of 196,608 for 49,152 float32 logits.
    """

    ids: Tensor
    log_p: Tensor
    rest: Tensor
    starts: dict[tuple[int, ...], int]


@torch.no_grad()
def feed(model: Any, rows: Sequence[Encoded], pad_id: int, *, on_progress: OnProgress = silent) -> None:
    """One forward pass for every row, alone, for whoever watches the model's layers meanwhile: they see no padding."""
    model.eval()
    for number, row in enumerate(rows):
        on_progress(Progress("feed the tuned model", number, len(rows), "rows"))
        prefill(model, [row.input_ids], pad_id, keep=1)


@torch.no_grad()
def ask_teacher(model: Any, rows: Sequence[Encoded], pad_id: int, *, on_progress: OnProgress = silent) -> Teacher:
    """One forward pass for every row, alone as in `feed`, and what it says."""
    model.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    starts: dict[tuple[int, ...], int] = {}
    position = 0
    for number, row in enumerate(rows):
        on_progress(Progress("ask the tuned model", number, len(rows), "rows"))
        (logits,) = _all_logits(model, [row], pad_id)
        log_p, ids = torch.log_softmax(logits.float(), -1).topk(min(TOP, logits.shape[-1]), dim=-1)
        parts.append((ids.int().cpu(), log_p.half().cpu(), _log_rest(log_p).half().cpu()))
        starts[row.input_ids] = position
        position += len(row.input_ids)
    ids, log_p, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return Teacher(ids, log_p, rest, starts)


@torch.no_grad()
def divergence_from_teacher(
    model: Any, rows: Sequence[Encoded], pad_id: int, batch_size: int, teacher: Teacher
) -> dict[str, float]:
    """The judge of a fold (`loop.Judge`): how far the model is from its teacher on held-out rows, as the loss has it."""
    model.eval()
    nats = 0.0
    for batch in batches([len(row.input_ids) for row in rows], batch_size):
        nats += float(distillation_loss(model, [rows[i] for i in batch], pad_id, teacher))
    model.train()
    return {"validation_loss": nats / sum(sum(row.in_loss) for row in rows)}


def _all_logits(model: Any, rows: Sequence[Encoded], pad_id: int) -> list[Tensor]:
    """(tokens, vocabulary) of each row."""
    longest = max(len(r.input_ids) for r in rows)
    logits = prefill(model, [r.input_ids for r in rows], pad_id, keep=longest).logits
    return [row_logits[-len(row.input_ids) :] for row, row_logits in zip(rows, logits, strict=True)]


def _log_rest(log_p: Tensor) -> Tensor:
    """Log of what is left of one; never less than -16, so that nothing is infinite."""
    return torch.log1p(-log_p.exp().sum(-1).clamp(max=1 - 1e-7))


def distillation_loss(model: Any, rows: Sequence[Encoded], pad_id: int, teacher: Teacher) -> Tensor:
    """Sum over the rows of KL(teacher ‖ model), nats, float32.

    A row counts as many positions as it has targets, half of the weight on the positions that predict a target and half on
    the others (all on the targets if there are no others): an answer may be one token, and what the model makes of the
    prompt tells much more about its weights.
    """
    total = torch.zeros((), device=model.device)
    for row, logits in zip(rows, _all_logits(model, rows, pad_id), strict=True):
        start = teacher.starts[row.input_ids]
        span = slice(start, start + len(row.input_ids) - 1)  # nothing follows the last token
        said = [t[span].to(logits.device) for t in (teacher.ids, teacher.log_p, teacher.rest)]
        divergence = TopDivergence.apply(logits[:-1].float(), said[0].long(), said[1].float(), said[2].float())
        target = torch.tensor(row.in_loss[1:], device=logits.device)
        count = int(target.sum())
        if count == len(target):
            total = total + divergence.sum()
        else:
            total = total + 0.5 * divergence[target].sum() + 0.5 * count * divergence[~target].mean()
    return total


class TopDivergence(torch.autograd.Function):
    """KL(teacher ‖ student) over the teacher's likeliest tokens and one class for the rest."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, log_p: Tensor, rest: Tensor) -> Tensor:
        """logits: float (positions, vocabulary); ids: int64, log_p: float (positions, k); rest: float (positions,).

        Returns nats (positions,). The gradient is formed here, in the memory of the softmax.
        """
        log_q = torch.log_softmax(logits, -1)
        ours = log_q.gather(-1, ids)
        ours_rest = _log_rest(ours)
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
