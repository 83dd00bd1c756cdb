"""Encoder-decoders: a row is a source and the text to write for it, targets are the text's tokens and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from qft.bundle.seq2seq import Reader
from qft.data.sequences import Pair, Source
from qft.kernels.loss import draw
from qft.progress import OnProgress, Progress, silent
from qft.training.distill import Teacher, TopDivergence, teach
from qft.training.forward import Validation

_TOGETHER = 8  # clips of a forward pass without gradients: an encoder's state may be larger than all else


@dataclass(frozen=True)
class Seq2SeqForward:
    """`Forward` for an encoder-decoder. reader_of: the model's reader. learning_reader_of: another one for `loss`."""

    reader_of: Callable[[Any], Reader]
    learning_reader_of: Callable[[Any], Reader] | None = None

    def start(
        self,
        model: Any,
        rows: Sequence[Pair],
        validation: Sequence[Pair],
        *,
        batch_size: int,
        on_progress: OnProgress = silent,
    ) -> bool:
        """Nothing is new."""
        return False

    def loss(self, model: Any, rows: Sequence[Pair], *, label_smoothing: float = 0.0) -> Tensor:
        """Sum of the cross entropy over target tokens, float32."""
        logits = self._target_logits(model, rows, (self.learning_reader_of or self.reader_of)(model))
        return cross_entropy(logits, _targets(model, rows), reduction="sum", label_smoothing=label_smoothing)

    @torch.no_grad()
    def validate(self, model: Any, rows: Sequence[Pair], batch_size: int) -> Validation:
        """Loss and right tokens on held-out rows; leaves the model in training mode."""
        model.eval()
        row_nats, right = [], 0
        for start in range(0, len(rows), min(batch_size, _TOGETHER)):
            some = rows[start : start + min(batch_size, _TOGETHER)]
            logits, targets = self._target_logits(model, some), _targets(model, some)
            nats = cross_entropy(logits, targets, reduction="none")
            row_nats += [float(part.sum()) for part in nats.split([row.targets for row in some])]
            right += int((logits.argmax(-1) == targets).sum())
        model.train()
        count = sum(row.targets for row in rows)
        return Validation(sum(row_nats) / count, 100 * right / count, row_nats)

    @torch.no_grad()
    def feed(self, model: Any, row: Pair) -> Tensor:
        """One row alone."""
        return self._logits(model, [row])[0]

    @torch.no_grad()
    def ask(self, model: Any, rows: Sequence[Pair], *, on_progress: OnProgress = silent) -> Teacher:
        """The likeliest tokens at every target of every row."""

        def said() -> Iterator[tuple[Pair, Tensor]]:
            for number, row in enumerate(rows):
                on_progress(Progress("ask the tuned model", number, len(rows), "rows"))
                yield row, self._logits(model, [row])[0]

        return teach(said())

    def divergence(self, model: Any, rows: Sequence[Pair], teacher: Teacher) -> Tensor:
        """Sum of KL(teacher ‖ model) over targets, nats, float32."""
        total = torch.zeros((), device=model.device)
        for row, logits in zip(rows, self._logits(model, rows), strict=True):
            total = total + TopDivergence.apply(logits, teacher.said(row, slice(0, row.targets), logits.device)).sum()
        return total

    def drawn_log_p(self, model: Any, rows: Sequence[Pair], chance: torch.Generator) -> Tensor:
        """Of a token drawn at each target."""
        log_p = torch.log_softmax(self._target_logits(model, rows), -1)
        return log_p.gather(-1, draw(log_p.detach(), chance)[:, None]).sum()

    def _logits(self, model: Any, rows: Sequence[Pair]) -> list[Tensor]:
        """float32 (targets, vocabulary) of each row: what is said where a target follows."""
        return list(self._target_logits(model, rows).split([row.targets for row in rows]))

    def _target_logits(self, model: Any, rows: Sequence[Pair], reader: Reader | None = None) -> Tensor:
        """float32 (targets of all rows, vocabulary). The head, which is large, is asked for these positions alone.

        reader: another than the model's.
        """
        fed = [row.fed.ids for row in rows]
        width = max(map(len, fed))
        # Rows are filled up on the right, where a causal decoder never looks from.
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in fed], device=model.device)
        spans = [range(row.answer_start - 1, len(row.input_ids) - 1) for row in rows]
        wanted = torch.tensor([(number, place) for number, span in enumerate(spans) for place in span]).T
        numbers, places = wanted.to(model.device)
        sources = as_tensors((reader or self.reader_of(model))([row.source for row in rows]), model)
        head = model.get_output_embeddings()
        with head.register_forward_pre_hook(lambda _, inputs: (inputs[0][numbers, places][None],)):
            logits = model(**sources, decoder_input_ids=ids, use_cache=False).logits
        return logits[0].float()


def as_tensors(fed: dict[str, np.ndarray], model: Any) -> dict[str, Tensor]:
    """On the model's device, floats in its type."""
    tensors = {name: torch.from_numpy(values).to(model.device) for name, values in fed.items()}
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def _targets(model: Any, rows: Sequence[Pair]) -> Tensor:
    return torch.tensor([token for row in rows for token in row.input_ids[row.answer_start :]], device=model.device)


class TorchNetwork:
    """A Hugging Face encoder-decoder as `Seq2SeqRunner` asks it; leaves its train/eval mode as it was."""

    def __init__(self, model: Any, reader: Reader) -> None:
        self.model = model
        self.reader = reader

    @torch.no_grad()
    def encode(self, sources: Sequence[Source]) -> list[Tensor]:
        """(positions, width) of each, without those that only fill up."""
        was_training = self.model.training
        self.model.eval()
        fed = as_tensors(self.reader(sources), self.model)
        states = self.model.get_encoder()(**fed).last_hidden_state
        self.model.train(was_training)
        lengths = fed["attention_mask"].sum(-1).tolist() if "attention_mask" in fed else [states.shape[1]] * len(states)
        return [state[:length] for state, length in zip(states, lengths, strict=True)]

    @torch.no_grad()
    def decode(self, ids: np.ndarray, states: Sequence[Tensor], cache: Any) -> tuple[np.ndarray, Any]:
        """See `Network`. cache: transformers' own."""
        was_training = self.model.training
        self.model.eval()
        out = self.model(
            encoder_outputs=(pad_sequence(list(states), batch_first=True),),
            attention_mask=pad_sequence([state.new_ones(len(state)) for state in states], batch_first=True),
            decoder_input_ids=torch.from_numpy(ids).to(self.model.device),
            past_key_values=cache,
            use_cache=True,
        )
        self.model.train(was_training)
        return out.logits.float().cpu().numpy(), out.past_key_values
