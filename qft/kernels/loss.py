"""Cross entropy of a head's logits, without ever holding all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qft.kernels.norm import widened

_CHUNK_LOGITS = 2**23  # of one product: 160 tokens of SmolLM2's 49,152 choices, 32 of Gemma's 262,144
_ROWS = 16  # of one product, and multiples of it
_WIDE_LOGITS = 2**20  # of these in float32 at once: what stays in the cache from one pass over them to the next


class _OfHead(torch.autograd.Function):
    """What a forward pass keeps is the gradient of the hidden states, formed with the logits."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Gradient of the hidden states alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


class HeadLoss(_OfHead):
    """Sum of -log softmax(hidden Wᵀ)[target]: logits are formed a chunk at a time, and their gradient at once, in their place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """hidden: (targets, width); weight: (choices, width), frozen; targets: int64 (targets,). Returns nats, float32.

        label_smoothing: share of each target's probability that is spread over all choices (arXiv 1512.00567, section 7).
        """
        total, gradient = _by_chunks(
            hidden, weight, lambda logits, part: _cross_entropy(logits, targets[part], label_smoothing)
        )
        ctx.save_for_backward(gradient)
        return total


class HeadDivergence(_OfHead):
    """Weighted sum of KL(teacher ‖ softmax(hidden Wᵀ)), as `top_divergence` has it; logits come and go as in `HeadLoss`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, said: Said, counts: Tensor) -> Tensor:
        """hidden: (positions, width); weight: (choices, width), frozen; counts: float32 (positions,). Returns nats, float32."""

        def of_chunk(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            nats, gradient = top_divergence(widened(logits), Said(*(t[part] for t in said)))
            return nats @ counts[part], gradient.mul_(counts[part, None])

        total, gradient = _by_chunks(hidden, weight, of_chunk)
        ctx.save_for_backward(gradient)
        return total


class HeadDraw(_OfHead):
    """Weighted sum of -log softmax(hidden Wᵀ)[token], the token drawn from that softmax; logits come and go as in `HeadLoss`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, counts: Tensor, chance: torch.Generator) -> Tensor:
        """hidden: (positions, width); weight: (choices, width), frozen; counts: float32 (positions,). Returns nats, float32."""

        def of_chunk(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            log_p = torch.log_softmax(widened(logits), -1)
            drawn = draw(log_p, chance)[:, None]
            nats = -log_p.gather(-1, drawn)[:, 0] @ counts[part]
            gradient = log_p.exp_().scatter_add_(-1, drawn, log_p.new_full(drawn.shape, -1.0))
            return nats, gradient.mul_(counts[part, None])

        total, gradient = _by_chunks(hidden, weight, of_chunk)
        ctx.save_for_backward(gradient)
        return total


def draw(log_p: Tensor, chance: torch.Generator) -> Tensor:
    """int64 (positions,): a token of each position's distribution. log_p: float32 (positions, vocabulary)."""
    until = log_p.exp().cumsum(-1)
    below = torch.rand(len(log_p), 1, generator=chance).to(until.device) * until[:, -1:]
    return torch.searchsorted(until, below)[:, 0].clamp_(max=log_p.shape[-1] - 1)


class Said(NamedTuple):
    """A teacher's likeliest tokens. ids: int64, log_p: float32 (positions, k); rest: float32 (positions,), log of all others' share."""

    ids: Tensor
    log_p: Tensor
    rest: Tensor


def top_divergence(logits: Tensor, said: Said) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) over the teacher's likeliest tokens and one class for the rest: nats (positions,), and its gradient.

    logits: float32 (positions, vocabulary). The gradient is formed in the memory of the softmax.
    """
    log_q = torch.log_softmax(logits, -1)
    ours = log_q.gather(-1, said.ids)
    ours_rest = log_rest(ours)
    p, p_rest = said.log_p.exp(), said.rest.exp()
    divergence = (p * (said.log_p - ours)).sum(-1) + p_rest * (said.rest - ours_rest)
    # d/d log_q of each kept token: its own term, and that the rest is one minus their sum.
    of_kept = p_rest[:, None] * (ours - ours_rest[:, None]).exp() - p
    gradient = log_q.exp_().mul_(-of_kept.sum(-1, keepdim=True)).scatter_add_(-1, said.ids, of_kept)
    return divergence, gradient


def log_rest(log_p: Tensor) -> Tensor:
    """Log of what is left of one; never less than -16, so that nothing is infinite."""
    return torch.log1p(-log_p.exp().sum(-1).clamp(max=1 - 1e-7))


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Summed nats, float32, and the gradient of the logits, in their type."""
    p = torch.softmax(logits, -1, dtype=widened(logits[:0]).dtype)
    # The likeliest choice's probability is never tiny, the target's may be: log Σ exp is exact by way of the former.
    log_sum = widened(logits.amax(-1)) - p.amax(-1).log_()
    at = targets[:, None]
    nats = log_sum - (1 - label_smoothing) * widened(logits.gather(-1, at)[:, 0])
    p.scatter_add_(-1, at, p.new_full(at.shape, label_smoothing - 1))
    if label_smoothing:
        nats -= label_smoothing * widened(logits).mean(-1)
        p -= label_smoothing / logits.shape[-1]
    return nats.sum(), p.to(logits.dtype)


def _by_chunks(
    hidden: Tensor, weight: Tensor, of_chunk: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Summed nats, and the gradient of `hidden`. of_chunk: logits and their places → nats, and the gradient of the logits."""
    wide = max(1, _WIDE_LOGITS // len(weight))
    total, gradient, chunk = widened(hidden.new_zeros(())), torch.empty_like(hidden), _chunk(weight)
    room = hidden.new_empty(chunk + _ROWS, len(weight))
    for start in range(0, len(hidden), chunk):
        some = hidden[start : start + chunk]
        filled = _filled(some)
        logits = torch.mm(filled, weight.t(), out=room[: len(filled)])
        for first in range(0, len(some), wide):
            part = logits[first : min(first + wide, len(some))]
            nats, d_logits = of_chunk(part, slice(start + first, start + first + len(part)))
            part.copy_(d_logits)
            total += nats
        gradient[start : start + chunk] = (logits @ weight)[: len(some)]
    return total, gradient


def _chunk(weight: Tensor) -> int:
    """Rows of one product."""
    rows = max(1, _CHUNK_LOGITS // len(weight))
    return rows - rows % _ROWS or rows


def _filled(hidden: Tensor) -> Tensor:
    """With zeros up to a multiple of `_ROWS`: see `qft.kernels.attention.Block`."""
    return torch.nn.functional.pad(hidden, (0, 0, 0, -len(hidden) % _ROWS))


def head_says(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Without gradients, as `HeadLoss` takes them: each target's nats, float32 (targets,), and whether it is the first choice."""
    chunk = _chunk(weight)
    nats, right = [], []
    for some, at in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = (_filled(some) @ weight.t())[: len(some)]
        nats.append(torch.nn.functional.cross_entropy(widened(logits), at, reduction="none"))
        right.append(logits.argmax(-1) == at)
    return torch.cat(nats), torch.cat(right)
