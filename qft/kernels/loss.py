"""Cross entropy of a head's logits, without ever holding all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qft.kernels.norm import widened

_CHUNK_LOGITS = 2**23  # at once: 170 tokens of SmolLM2's 49,152 choices, 32 of Gemma's 262,144


class HeadLoss(torch.autograd.Function):
    """Sum of -log softmax(hidden Wᵀ)[target]: logits are formed a chunk at a time, and their gradient at once, in their place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """hidden: (targets, width); weight: (choices, width), frozen; targets: int64 (targets,). Returns nats, float32.

        label_smoothing: share of each target's probability that is spread over all choices (arXiv 1512.00567, section 7).
        """
        chunk = max(1, _CHUNK_LOGITS // len(weight))
        total, gradient = widened(hidden.new_zeros(())), torch.empty_like(hidden)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            nats, d_logits = _cross_entropy(hidden[part] @ weight.t(), targets[part], label_smoothing)
            total += nats
            gradient[part] = d_logits @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Gradient of the hidden states alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


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


def head_says(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Without gradients, as `HeadLoss` takes them: each target's nats, float32 (targets,), and whether it is the first choice."""
    chunk = max(1, _CHUNK_LOGITS // len(weight))
    nats, right = [], []
    for some, at in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = some @ weight.t()
        nats.append(torch.nn.functional.cross_entropy(widened(logits), at, reduction="none"))
        right.append(logits.argmax(-1) == at)
    return torch.cat(nats), torch.cat(right)
