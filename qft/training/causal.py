"""Language models: rows are token sequences, targets are the tokens in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qft.data.encode import Encoded, shared_prefix
from qft.kernels.decoder import Decoder, decoder
from qft.kernels.layer import Keep
from qft.kernels.loss import HeadDivergence, HeadDraw, HeadLoss, Said, draw, head_says
from qft.measure.quality import batches
from qft.progress import OnProgress, Progress, silent
from qft.training.distill import Teacher, TopDivergence, teach
from qft.training.forward import Validation
from qft.training.runner import may_share, prefill

_ASKED_TOKENS = 1024  # at once; products of fewer rows are slower
_LOGIT_ROWS = 128  # whose logits are held at once


@dataclass(frozen=True)
class CausalForward:
    """`Forward` for a decoder that predicts every next token. pad_id: fills rows up on the left, never looked at."""

    pad_id: int

    def start(
        self,
        model: Any,
        rows: Sequence[Encoded],
        validation: Sequence[Encoded],
        *,
        batch_size: int,
        on_progress: OnProgress = silent,
    ) -> bool:
        """Nothing is new: its own head stays."""
        return False

    def loss(self, model: Any, rows: Sequence[Encoded], *, label_smoothing: float = 0.0) -> Tensor:
        """Sum of the cross entropy over target tokens, float32. Only positions that can hold a target get logits."""
        fast = _kernels(model)
        if fast is not None:
            hidden, targets = _before_targets(fast, model, rows)
            return HeadLoss.apply(hidden, fast.head.weight.detach(), targets, label_smoothing)
        logits, targets = self._target_logits(model, rows)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)

    @torch.no_grad()
    def validate(self, model: Any, rows: Sequence[Encoded], batch_size: int) -> Validation:
        """Loss and right tokens on held-out rows; leaves the model in training mode."""
        model.eval()
        counts = [row.targets for row in rows]
        right, row_nats = 0, [0.0] * len(rows)
        for batch in batches([len(r.input_ids) for r in rows], batch_size):
            nats, hits = self._nats(model, [rows[i] for i in batch])
            for index, part in zip(batch, nats.split([counts[i] for i in batch]), strict=True):
                row_nats[index] = part.sum().item()
            right += int(hits.sum())
        model.train()
        return Validation(sum(row_nats) / sum(counts), 100 * right / sum(counts), row_nats)

    @torch.no_grad()
    def feed(self, model: Any, row: Encoded) -> Tensor:
        """One row alone; the head sees the last position of it, which depends on all others."""
        return prefill(model, [row.input_ids], self.pad_id, keep=1).logits

    @torch.no_grad()
    def ask(self, model: Any, rows: Sequence[Encoded], *, on_progress: OnProgress = silent) -> Teacher:
        """The likeliest tokens at every position of every row."""

        def said() -> Iterator[tuple[tuple[int, ...], Tensor]]:
            fast, done = _kernels(model), 0
            for batch in batches([len(row.input_ids) for row in rows], len(rows), _ASKED_TOKENS if fast else 1):
                some = [rows[i] for i in batch]
                on_progress(Progress("ask the tuned model", done, len(rows), "rows"))
                yield from _said_by(fast, some) if fast else [(some[0].input_ids, self._all_logits(model, some)[0])]
                done += len(some)

        return teach(said())

    def divergence(self, model: Any, rows: Sequence[Encoded], teacher: Teacher) -> Tensor:
        """Sum over the rows of KL(teacher ‖ model), nats, float32.

        A row counts as many positions as it has targets, half of the weight on the positions that predict a target and half
        on the others (all on the targets if there are no others): an answer may be one token, and what the model makes of
        the prompt tells much more about its weights.
        """
        fast = _kernels(model)
        if fast is not None:
            return _divergence(fast, model, rows, teacher)
        total = torch.zeros((), device=model.device)
        for row, logits in zip(rows, self._all_logits(model, rows), strict=True):
            said = teacher.said(row.input_ids, slice(0, len(row.input_ids) - 1), logits.device)
            total = total + TopDivergence.apply(logits[:-1].float(), said) @ _counts(row).to(logits.device)
        return total

    def drawn_log_p(self, model: Any, rows: Sequence[Encoded], chance: torch.Generator) -> Tensor:
        """Of a token drawn at each position, times the root of what the position counts in `divergence`.

        So the mean of its gradients' squares is the curvature of the divergence.
        """
        counts = torch.cat([torch.nn.functional.pad(_counts(row), (0, 1)) for row in rows]).sqrt()
        fast = _kernels(model)
        if fast is not None:
            hidden = fast.hidden([row.input_ids for row in rows], keep=_keep(model))
            return -HeadDraw.apply(hidden, fast.head.weight.detach(), counts, chance)
        log_p = torch.log_softmax(torch.cat(self._all_logits(model, rows)).float(), -1)
        drawn = draw(log_p.detach(), chance)[:, None]
        return log_p.gather(-1, drawn)[:, 0] @ counts.to(log_p.device)

    def _nats(self, model: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Of each target: its cross entropy, float32, and whether it is the first choice."""
        fast = _kernels(model)
        if fast is not None:
            hidden, targets = _before_targets(fast, model, rows)
            return head_says(hidden, fast.head.weight, targets)
        logits, targets = self._target_logits(model, rows)
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return nats, logits.argmax(-1) == targets

    def _target_logits(self, model: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """float32 (targets, vocabulary) and int64 (targets,): what is said where a token is in the loss, and that token."""
        keep = min(max(len(r.input_ids) - r.first_target for r in rows) + 1, max(len(r.input_ids) for r in rows))
        fed = prefill(model, [r.input_ids for r in rows], self.pad_id, keep=keep)
        keep, device = fed.logits.shape[1], fed.logits.device
        # Numbers, where a mask would make a card stop and count.
        numbers, places, tokens = torch.tensor(
            [
                (number, keep - len(row.input_ids) + place - 1, row.input_ids[place])
                for number, row in enumerate(rows)
                for place, wanted in enumerate(row.in_loss)
                if wanted
            ]
        ).T.to(device)
        return fed.logits[numbers, places].float(), tokens

    def _all_logits(self, model: Any, rows: Sequence[Encoded]) -> list[Tensor]:
        """(tokens, vocabulary) of each row."""
        longest = max(len(r.input_ids) for r in rows)
        logits = prefill(model, [r.input_ids for r in rows], self.pad_id, keep=longest).logits
        return [row_logits[-len(row.input_ids) :] for row, row_logits in zip(rows, logits, strict=True)]


def _kernels(model: Any) -> Decoder | None:
    """The model as kernels that need no padding: on a processor, where they are faster than transformers' modules.

    Looked up at every step, a few milliseconds: modules may be exchanged in between.
    """
    return decoder(model) if model.device.type == "cpu" else None


def _before_targets(fast: Decoder, model: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """What the head reads where the next token is in the loss, (targets, width), and these tokens, int64, row by row."""
    ids = [row.input_ids for row in rows]
    wanted = min(row.first_target for row in rows) - 1  # the first position that foretells something
    prefix = min(shared_prefix(ids), wanted) if may_share(model) else 0
    hidden, places, start = fast.hidden(ids, prefix=prefix, keep=_keep(model)), [], prefix
    for row in rows:
        places += [start + place - 1 - prefix for place in range(prefix, len(row.input_ids)) if row.in_loss[place]]
        start += len(row.input_ids) - prefix
    targets = [token for row in rows for token, wanted in zip(row.input_ids, row.in_loss, strict=True) if wanted]
    return hidden[torch.tensor(places)], torch.tensor(targets)


def _counts(row: Encoded) -> Tensor:
    """float32 (tokens - 1,): what each position counts in the divergence; nothing follows the last token."""
    target = torch.tensor(row.in_loss[1:])
    targets, others = int(target.sum()), int((~target).sum())
    if not others:
        return torch.ones(targets)
    return torch.where(target, 0.5, 0.5 * targets / others)


def _divergence(fast: Decoder, model: Any, rows: Sequence[Encoded], teacher: Teacher) -> Tensor:
    """As `CausalForward.divergence`; positions of a shared beginning are there once and count for every row."""
    ids, counts = [row.input_ids for row in rows], [_counts(row) for row in rows]
    prefix = shared_prefix(ids) if may_share(model) else 0
    hidden, start = fast.hidden(ids, prefix=prefix, keep=_keep(model)), prefix
    places, said, weights = [], [], []
    if prefix:
        places.append(torch.arange(prefix))
        said.append(teacher.said(ids[0], slice(0, prefix), hidden.device))
        weights.append(torch.stack([count[:prefix] for count in counts]).sum(0))
    for row, count in zip(ids, counts, strict=True):
        places.append(torch.arange(start, start + len(count) - prefix))
        said.append(teacher.said(row, slice(prefix, len(count)), hidden.device))
        weights.append(count[prefix:])
        start += len(row) - prefix
    whole = Said(*(torch.cat(parts) for parts in zip(*said, strict=True)))
    return HeadDivergence.apply(hidden[torch.cat(places)], fast.head.weight.detach(), whole, torch.cat(weights))


def _said_by(fast: Decoder, rows: Sequence[Encoded]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Logits of every row, some of its positions at a time."""
    hidden = fast.hidden([row.input_ids for row in rows])
    for row, of_row in zip(rows, hidden.split([len(row.input_ids) for row in rows]), strict=True):
        for some in of_row.split(_LOGIT_ROWS):
            yield row.input_ids, some @ fast.head.weight.t()


def _keep(model: Any) -> Keep:
    return "input" if getattr(model, "is_gradient_checkpointing", False) else "all"
