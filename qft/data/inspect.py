"""What is in the rows: counts for the report, and which tokens are in the loss for `qft plan`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from qft.data.encode import Encoded, EncodedRow
from qft.data.examples import Example
from qft.data.mix import Mixed
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError

_MOST_UNKNOWN_PERCENT = 5.0  # with more, a tokenizer was made for other text than this


@dataclass(frozen=True)
class DataReport:
    """Rows and tokens after preparing.

    leaked: training rows (after duplicates) dropped because their text is held out. also_in_train: held-out rows whose
    text was among the training rows: of a source of their own, or of another group. without_group: rows that have no value in
    data.group_column, where there is one. changed_copies: of training rows, among those that are mixed.
    heard_changed: training rows whose sound is changed, otherwise each time. mixed: the sources of the training rows, where they
    have weights.
    tokens, unknown_tokens: of all parts. shortened: rows whose prompt was, by max_length; cut: whose answer was.
    """

    rows_read: int
    empty: int
    in_no_bin: int
    duplicates: int
    conflicts: int
    leaked: int
    also_in_train: int
    changed_copies: int
    heard_changed: int
    mixed: list[Mixed]
    cut: int
    nothing_in_loss: int
    tokens: int
    unknown_tokens: int
    train_rows: int
    validation_rows: int
    eval_rows: int
    train_tokens: int
    train_target_tokens: int
    length_median: int
    length_95_percent: int
    length_longest: int
    labels: dict[str, int]
    shortened: int = 0
    without_group: int | None = None

    def warnings(self) -> list[str]:
        """What is likely wrong with these rows for this model."""
        unknown = 100 * self.unknown_tokens / max(1, self.tokens)
        if unknown <= _MOST_UNKNOWN_PERCENT:
            return []
        return [
            f"{unknown:.0f} % of the tokens are unknown to the model's tokenizer, so it cannot tell them apart; "
            "choose a model that was made for this language"
        ]


def length_percentiles(encoded: Sequence[EncodedRow]) -> tuple[int, int, int]:
    """Median, 95th percentile and longest length in tokens."""
    lengths = sorted(len(e.input_ids) for e in encoded)
    return lengths[len(lengths) // 2], lengths[int(len(lengths) * 0.95)], lengths[-1]


def marked(encoded: Encoded, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
    """Runs of text with whether their tokens are in the loss."""
    pairs = zip(encoded.input_ids, encoded.in_loss, strict=True)
    return [
        (tokenizer.decode([token for token, _ in run], skip_special_tokens=False), flag)
        for flag, run in groupby(pairs, key=lambda pair: pair[1])
    ]


def check_loss_mask(encoded: Sequence[Encoded], *, answers_only: bool) -> None:
    """Raises InputError if no token is in the loss, or all are though only answers should be."""
    targets = sum(sum(e.in_loss) for e in encoded)
    tokens = sum(len(e.in_loss) for e in encoded)
    if targets == 0:
        raise InputError("no token is in the loss: nothing would be learnt", where="data")
    if answers_only and targets == tokens:
        raise InputError(
            "every token is in the loss, prompts too",
            where="data.format",
            hint="the rows have empty prompts; plain text is data.format: text",
        )


def majority_percent(parts: Mapping[str, Sequence[Example]]) -> float | None:
    """Test rows whose answer is the one that most training rows have; None where rows have no labels."""
    first = parts["train"][0]
    if first.labels is None or first.passage is not None:  # whether a passage holds an answer is not the answer
        return None
    ((answer, _),) = Counter(example.labels for example in parts["train"]).most_common(1)
    return 100 * sum(example.labels == answer for example in parts["eval"]) / len(parts["eval"])
