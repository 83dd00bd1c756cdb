"""What a model of sources writes for every row, and the loss of what it should have written: transcripts, translations. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qft.bundle.seq2seq import Seq2SeqRunner
from qft.data.sequences import MOST_TOKENS, Pair, positions
from qft.data.tokenizer import TextTokenizer
from qft.measure.agreement import log_softmax
from qft.measure.quality import Measuring, RowAnswer, batches
from qft.progress import Progress

_MOST_POSITIONS = 24_000  # of the sources whose states are held at a time: 16 of Whisper's windows
_MOST_LOGITS = 50_000_000  # of one look at expected texts: 0.2 GB


@dataclass(frozen=True)
class Written:
    """answers: of every row, in order. hits_percent: targets that are the first choice. loss: nats a target."""

    answers: list[RowAnswer]
    hits_percent: float
    loss: float
    targets: int


def write_all(
    runner: Seq2SeqRunner, rows: Sequence[Pair], tokenizer: TextTokenizer, how: Measuring, *, unit: str
) -> Written:
    """Ask for every row's loss and greedy text. An answer is right if it is the expected text, but for white space at its ends.

    unit: what is counted while it goes on.
    """
    longest = max(row.targets for row in rows)
    most = min(longest + how.extra_tokens, MOST_TOKENS - rows[0].answer_start)
    at_a_time = max(1, min(how.batch_size, _MOST_LOGITS // (longest * tokenizer.vocab_size)))
    found: dict[int, RowAnswer] = {}
    hits, nats = 0, 0.0
    for batch in batches([positions(row.source) for row in rows], at_a_time, _MOST_POSITIONS):
        some = [rows[number] for number in batch]
        losses = []
        logits = runner.logits([row.fed for row in some], max(row.targets for row in some))
        for number, row, values in zip(batch, some, logits, strict=True):
            said, targets = values[-row.targets :], list(row.input_ids[row.answer_start :])
            if how.witness is not None:
                how.witness.look(number, said)
            losses.append(float(-log_softmax(said)[np.arange(row.targets), targets].sum()))
            hits += int((said.argmax(-1) == targets).sum())
        texts = runner.generate([row.prompt for row in some], max_new_tokens=most, stop_ids=tokenizer.stop_ids)
        for number, row, loss, ids in zip(batch, some, losses, texts, strict=True):
            text, ended = tokenizer.decode(ids).strip(), ids[-1] in tokenizer.stop_ids
            right = text == row.text.strip()
            found[number] = RowAnswer(row.where, row.text, text, right, ended, loss / row.targets, targets=row.targets)
        nats += sum(losses)
        how.on_progress(Progress("measure", len(found), len(rows), unit))
    count = sum(row.targets for row in rows)
    return Written([found[number] for number in range(len(rows))], 100 * hits / count, nats / count, count)
