"""Models that find an answer in a context: a row is a window, its target the places of the answer's first and last token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qft.bundle.reader import PADDING
from qft.data.windows import Window, text_numbers
from qft.measure.quality import batches
from qft.progress import OnProgress, Progress, silent
from qft.training.classify import right_pad
from qft.training.forward import Validation


@dataclass(frozen=True)
class Feed:
    """What a row is fed with. pad_id: fills rows up on the right, masked out. pair_mark: see `TextTokenizer.pair_mark`."""

    pad_id: int
    pair_mark: int | None

    def logits(self, model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
        """float32 (rows, 2, longest): the first and the last token of each row's answer, among places."""
        ids, mask = (tensor.to(model.device) for tensor in right_pad(rows, self.pad_id))
        # PEFT 0.21's own forward of this kind of model takes token_type_ids and loses them on the way.
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.pair_mark is not None and "token_type_ids" in inspect.signature(plain.forward).parameters:
            numbers = [text_numbers(row, self.pair_mark) for row in rows]
            inputs["token_type_ids"] = right_pad(numbers, 0)[0].to(ids.device)
        out = plain(**inputs)
        both = torch.stack([out.start_logits, out.end_logits], 1).float()
        return both.masked_fill(mask[:, None] == 0, PADDING)


def answer_nats(logits: Tensor, rows: Sequence[Window], *, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each row (rows,), the mean of its first and its last token. logits: (rows, 2, places).

    smoothing: share of the wanted probability that is spread over a row's places, not over its padding.
    """
    places = torch.tensor([row.span for row in rows], device=logits.device)
    nats = cross_entropy(logits.transpose(1, 2), places, reduction="none")
    if smoothing:
        real = (logits > PADDING).float()
        spread = -(logits.log_softmax(-1) * real).sum(-1) / real.sum(-1)
        nats = (1 - smoothing) * nats + smoothing * spread
    return nats.mean(-1)


@dataclass(frozen=True)
class ReaderForward:
    """`Forward` for a model with logits for the first and the last token of an answer."""

    feeding: Feed

    def start(
        self,
        model: Any,
        rows: Sequence[Window],
        validation: Sequence[Window],
        *,
        batch_size: int,
        on_progress: OnProgress = silent,
    ) -> bool:
        """The new head learns with the adapter, from zero on."""
        return False

    def loss(self, model: Any, rows: Sequence[Window], *, label_smoothing: float = 0.0) -> Tensor:
        """Sum of the rows' cross entropy, float32."""
        return answer_nats(self._logits(model, rows), rows, smoothing=label_smoothing).sum()

    @torch.no_grad()
    def validate(self, model: Any, rows: Sequence[Window], batch_size: int) -> Validation:
        """Loss, and windows of which both places are the first choice; leaves the model in training mode."""
        model.eval()
        row_nats, right = [0.0] * len(rows), 0
        for batch in batches([len(r.input_ids) for r in rows], batch_size):
            chosen = [rows[i] for i in batch]
            logits = self._logits(model, chosen)
            for index, nats in zip(batch, answer_nats(logits, chosen).tolist(), strict=True):
                row_nats[index] = nats
            guessed = logits.argmax(-1).tolist()
            right += sum(tuple(guess) == row.span for guess, row in zip(guessed, chosen, strict=True))
        model.train()
        return Validation(sum(row_nats) / len(rows), 100 * right / len(rows), row_nats)

    @torch.no_grad()
    def feed(self, model: Any, row: Window) -> Tensor:
        """One row alone."""
        return self._logits(model, [row])

    @torch.no_grad()
    def ask(self, model: Any, rows: Sequence[Window], *, on_progress: OnProgress = silent) -> dict[Any, Tensor]:
        """Logits, float32 (2, places), of every window."""
        said: dict[Any, Tensor] = {}
        for number, row in enumerate(rows):
            on_progress(Progress("ask the tuned model", number, len(rows), "rows"))
            said[row.input_ids] = self._logits(model, [row])[0].cpu()
        return said

    def divergence(self, model: Any, rows: Sequence[Window], teacher: dict[Any, Tensor]) -> Tensor:
        """Sum over the rows of KL(teacher ‖ model), the mean of first and last token, nats."""
        ours = self._logits(model, rows)
        theirs = torch.full_like(ours, PADDING)
        for values, row in zip(theirs, rows, strict=True):
            values[:, : len(row.input_ids)] = teacher[row.input_ids]
        log_p = theirs.log_softmax(-1)
        return (log_p.exp() * (log_p - ours.log_softmax(-1))).sum() / 2

    def drawn_log_p(self, model: Any, rows: Sequence[Window], chance: torch.Generator) -> Tensor:
        """Of a first and a last token drawn from the model itself."""
        log_p = self._logits(model, rows).log_softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=chance).to(log_p.device)
        return log_p.gather(-1, drawn).sum()

    def _logits(self, model: Any, rows: Sequence[Window]) -> Tensor:
        return self.feeding.logits(model, [row.input_ids for row in rows])


class TorchReader:
    """Runs a Hugging Face model as a bundle's session does; leaves its train/eval mode as it was."""

    def __init__(self, model: Any, feeding: Feed) -> None:
        self.model, self.feeding = model, feeding

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> Any:
        """float32 (rows, 2, longest), whatever `keep` is."""
        was_training = self.model.training
        self.model.eval()
        found = self.feeding.logits(self.model, rows).cpu().numpy()
        self.model.train(was_training)
        return found
