"""Examples → texts with their labels, for models that choose among labels instead of writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from qft.data.encode import EncodeCounts, tokens_of
from qft.data.examples import Example
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.progress import OnProgress, Progress, silent


@dataclass(frozen=True)
class LabelSet:
    """The labels of a job. train_rows: training rows that have each. several: a row may have any number of them."""

    names: tuple[str, ...]
    train_rows: tuple[int, ...]
    several: bool
    rows: int

    @staticmethod
    def of(train: Sequence[Example], *, several: bool) -> LabelSet:
        """The labels of training rows. Raises InputError if nothing could stand between several labels in an answer."""
        found = Counter(label for example in train for label in example.labels or ())
        names = tuple(sorted(found))
        commas, semicolons = ([name for name in names if mark in name] for mark in (", ", "; "))
        if several and commas and semicolons:
            raise InputError(
                f"the label {commas[0]!r} holds a comma, and {semicolons[0]!r} a semicolon",
                where="data.label_column",
                hint="one of them stands between a row's labels: write all labels without it",
            )
        return LabelSet(names, tuple(found[name] for name in names), several, len(train))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the training rows that have each label."""
        return tuple(count / max(1, self.rows) for count in self.train_rows)

    def weights(self, kind: str) -> tuple[float, ...]:
        """What a row of each label counts in the loss: one for all, or (balanced) every label as much as any other.

        With several labels a row: what a yes counts beside a no.
        """
        if kind == "none":
            return (1.0,) * len(self.names)
        if self.several:
            return tuple((self.rows - count) / max(1, count) for count in self.train_rows)
        return tuple(self.rows / (len(self.names) * max(1, count)) for count in self.train_rows)


@dataclass(frozen=True)
class Labelled:
    """A text and its labels: one, or with several labels a row any number of them. labels: places in the list of labels."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    text: str
    where: str

    @property
    def fed(self) -> tuple[int, ...]:
        """Token ids alone."""
        return self.input_ids

    @property
    def targets(self) -> int:
        """A row is one thing to predict."""
        return 1

    def as_dict(self) -> dict:
        """For a JSON line."""
        return asdict(self)

    @staticmethod
    def from_dict(line: dict) -> Labelled:
        """Undo `as_dict`."""
        return Labelled(tuple(line["input_ids"]), tuple(line["labels"]), line["text"], line["where"])


def shortened(ids: list[int], tokenizer: TextTokenizer, max_length: int) -> list[int]:
    """At most `max_length` of a text's ids, with its last special token, in training as in the bundle."""
    if len(ids) <= max_length:
        return ids
    end = ids[-1:] if ids[-1] in tokenizer.special_ids else []
    return ids[: max_length - len(end)] + end


def label_all(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    labels: Sequence[str],
    *,
    max_length: int,
    on_progress: OnProgress = silent,
) -> tuple[list[Labelled], EncodeCounts]:
    """Encode every example. Raises InputError if one has a label that is not in `labels`, or none was read."""
    place = {label: number for number, label in enumerate(labels)}
    rows: list[Labelled] = []
    cut = unknown = 0
    for number, example in enumerate(examples):
        if number % 500 == 0:
            on_progress(Progress("tokenize", number, len(examples), "rows"))
        if example.labels is None or example.passage is not None:
            raise InputError(
                "the rows have no labels", where="data.format", hint="text-classification needs data.format: labels"
            )
        foreign = [label for label in example.labels if label not in place]
        if foreign:
            raise InputError(
                f"the label {foreign[0]!r} is not among those to learn",
                where=example.where,
                hint=f"there are {', '.join(labels[:8])}{' …' if len(labels) > 8 else ''}",
            )
        text = example.messages[-2].content
        whole = tokenizer.encode(text, add_special_tokens=True)
        ids = shortened(whole, tokenizer, max_length)
        cut += len(ids) < len(whole)
        unknown += ids.count(tokenizer.unk_id) if tokenizer.unk_id is not None else 0
        rows.append(Labelled(tuple(ids), tuple(sorted(place[label] for label in example.labels)), text, example.where))
    return rows, EncodeCounts(cut, 0, unknown, tokens_of(rows), len(rows))
