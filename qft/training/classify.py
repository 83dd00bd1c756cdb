"""Classifiers: a row is a text, its target one label or, where rows may have several, a yes or no to every label."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid, one_hot

from qft.base_model import label_layer
from qft.data.labelled import Labelled
from qft.measure.quality import batches
from qft.progress import OnProgress, Progress, silent
from qft.training.forward import Validation
from qft.training.head import Seen, fit_linear

_HEAD_ROWS = 20_000  # that a new head is fitted on: their vectors are held in memory


def right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), int64 (rows, longest): encoders count positions from the left."""
    width = max(map(len, rows))
    ids = torch.tensor([list(r) + [pad_id] * (width - len(r)) for r in rows])
    return ids, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])


def label_logits(model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """float32 (rows, labels)."""
    ids, mask = (tensor.to(model.device) for tensor in right_pad(rows, pad_id))
    return model(input_ids=ids, attention_mask=mask).logits.float()


def wanted_labels(rows: Sequence[Labelled], labels: int) -> Tensor:
    """float32 (rows, labels): 1 where a label is the row's."""
    wanted = torch.zeros(len(rows), labels)
    for number, row in enumerate(rows):
        wanted[number, list(row.labels)] = 1
    return wanted


def label_nats(
    logits: Tensor, wanted: Tensor, *, several: bool, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of each row (rows,), with several labels summed over them. weights: of the labels, see `LabelSet`.

    smoothing: share of the wanted probability that is spread evenly, with several labels over yes and no of each.
    """
    if several:
        smooth = wanted * (1 - smoothing) + smoothing / 2
        return binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights, reduction="none").sum(-1)
    return cross_entropy(logits, wanted.argmax(-1), weight=weights, reduction="none", label_smoothing=smoothing)


@dataclass(frozen=True)
class ClassifierForward:
    """`Forward` for a model with a head over labels. pad_id: fills rows up on the right, masked out.

    label_weights: what a row of each label counts in the loss of training. several: sigmoid and binary cross entropy
    summed over the labels instead of softmax.
    """

    pad_id: int
    label_weights: tuple[float, ...]
    several: bool

    def start(
        self,
        model: Any,
        rows: Sequence[Labelled],
        validation: Sequence[Labelled],
        *,
        batch_size: int,
        on_progress: OnProgress = silent,
    ) -> bool:
        """Fit the head over the labels on what the frozen model says (of at most 20,000 rows)."""
        linear = label_layer(model, len(self.label_weights))
        some = random.Random(0).sample(rows, min(len(rows), _HEAD_ROWS))  # drawn: rows often lie sorted by label
        # How strongly to hold it back is chosen with the model's own dropout at work, as it will be in training: a head
        # that leans on small differences would begin there with a loss that explodes.
        torch.manual_seed(0)
        learn, choose = (
            Seen(
                self._head_inputs(model.train(dropout), linear, part, batch_size, on_progress),
                wanted_labels(part, linear.out_features),
            )
            for part, dropout in ((some, False), (validation, True))
        )
        nats = functools.partial(self._nats, weighted=True)
        weight, bias = fit_linear(learn, choose, nats, has_bias=linear.bias is not None)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if linear.bias is not None:
                linear.bias.copy_(bias)
        return True

    @torch.no_grad()
    def _head_inputs(
        self, model: Any, linear: Any, rows: Sequence[Labelled], batch_size: int, on_progress: OnProgress
    ) -> Tensor:
        """float32 (rows, hidden): a text's one vector, or that of its last token."""
        caught: list[Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].float().cpu()))
        found: dict[int, Tensor] = {}
        for batch in batches([len(r.input_ids) for r in rows], batch_size):
            texts = [rows[i].input_ids for i in batch]
            label_logits(model, texts, self.pad_id)
            values = caught.pop()
            if values.dim() == 3:
                values = values[torch.arange(len(texts)), torch.tensor([len(text) - 1 for text in texts])]
            found |= zip(batch, values, strict=True)
            on_progress(Progress("fit the head", len(found), len(rows), "rows"))
        hook.remove()
        return torch.stack([found[number] for number in range(len(rows))])

    def loss(self, model: Any, rows: Sequence[Labelled], *, label_smoothing: float = 0.0) -> Tensor:
        """Sum over the rows of their (weighted) cross entropy, float32."""
        logits = label_logits(model, [r.input_ids for r in rows], self.pad_id)
        wanted = wanted_labels(rows, logits.shape[1]).to(logits.device)
        return self._nats(logits, wanted, weighted=True, smoothing=label_smoothing).sum()

    @torch.no_grad()
    def validate(self, model: Any, rows: Sequence[Labelled], batch_size: int) -> Validation:
        """Loss without weights, and rows whose labels are all right; leaves the model in training mode."""
        model.eval()
        row_nats, right = [0.0] * len(rows), 0
        for batch in batches([len(r.input_ids) for r in rows], batch_size):
            chosen = [rows[i] for i in batch]
            logits = label_logits(model, [r.input_ids for r in chosen], self.pad_id)
            wanted = wanted_labels(chosen, logits.shape[1]).to(logits.device)
            for index, nats in zip(batch, self._nats(logits, wanted).tolist(), strict=True):
                row_nats[index] = nats
            guessed = (logits > 0).float() if self.several else one_hot(logits.argmax(-1), logits.shape[1])
            right += int((guessed == wanted).all(-1).sum())
        model.train()
        return Validation(sum(row_nats) / len(rows), 100 * right / len(rows), row_nats)

    @torch.no_grad()
    def feed(self, model: Any, row: Labelled) -> Tensor:
        """One row alone."""
        return label_logits(model, [row.input_ids], self.pad_id)

    @torch.no_grad()
    def ask(self, model: Any, rows: Sequence[Labelled], *, on_progress: OnProgress = silent) -> dict[Any, Tensor]:
        """Logits, float32 (labels,), of every text."""
        said: dict[Any, Tensor] = {}
        for number, row in enumerate(rows):
            on_progress(Progress("ask the tuned model", number, len(rows), "rows"))
            said[row.input_ids] = label_logits(model, [row.input_ids], self.pad_id)[0].cpu()
        return said

    def divergence(self, model: Any, rows: Sequence[Labelled], teacher: dict[Any, Tensor]) -> Tensor:
        """Sum over the rows of KL(teacher ‖ model), nats; with several labels a row, summed over its labels."""
        ours = label_logits(model, [r.input_ids for r in rows], self.pad_id)
        theirs = torch.stack([teacher[row.input_ids] for row in rows]).to(ours.device)
        if not self.several:
            log_p = theirs.log_softmax(-1)
            return (log_p.exp() * (log_p - ours.log_softmax(-1))).sum()
        yes = theirs.sigmoid()
        return (
            yes * (logsigmoid(theirs) - logsigmoid(ours)) + (1 - yes) * (logsigmoid(-theirs) - logsigmoid(-ours))
        ).sum()

    def drawn_log_p(self, model: Any, rows: Sequence[Labelled], chance: torch.Generator) -> Tensor:
        """Of a label, or of a yes or no to every label, drawn from the model itself."""
        logits = label_logits(model, [row.input_ids for row in rows], self.pad_id)
        if self.several:
            yes = torch.bernoulli(logits.detach().sigmoid().cpu(), generator=chance).to(logits.device)
            return -binary_cross_entropy_with_logits(logits, yes, reduction="sum")
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=chance).to(logits.device)
        return logits.log_softmax(-1).gather(-1, drawn).sum()

    def _nats(self, logits: Tensor, wanted: Tensor, *, weighted: bool = False, smoothing: float = 0.0) -> Tensor:
        weights = torch.tensor(self.label_weights, device=logits.device) if weighted else None
        return label_nats(logits, wanted, several=self.several, weights=weights, smoothing=smoothing)


class TorchClassifier:
    """Runs a Hugging Face classifier as a bundle's session does; leaves its train/eval mode as it was."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> Any:
        """float32 (rows, 1, labels), whatever `keep` is: a text has one answer."""
        was_training = self.model.training
        self.model.eval()
        found = label_logits(self.model, rows, self.pad_id)[:, None].cpu().numpy()
        self.model.train(was_training)
        return found
