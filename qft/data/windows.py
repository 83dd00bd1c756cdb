"""Questions with their contexts → windows a model can be fed, each with the characters that its tokens stand for.

A context that is too long is cut into windows that share tokens, so that an answer lies whole in one of them (BERT, arXiv
1810.04805, as its authors' SQuAD code does it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from qft.data.encode import EncodeCounts
from qft.data.examples import Example
from qft.data.passages import Passage
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.progress import OnProgress, Progress, silent

NOWHERE = (0, 0)  # the first token, which marks the beginning of a text, stands for "no answer here"


@dataclass(frozen=True)
class Window:
    """A question and a part of its context, as the tokenizer joins them.

    span: places in input_ids of the answer's first and last token, NOWHERE if this part does not hold it.
    first: place of the context's first token. offsets: (begin, end) characters of the whole context that each of its tokens
    stands for. text: the part of the context, from the first token's begin to the last one's end. number: counts a question's
    windows from 0.
    """

    input_ids: tuple[int, ...]
    span: tuple[int, int]
    first: int
    offsets: tuple[tuple[int, int], ...]
    text: str
    number: int
    question: str
    answers: tuple[str, ...]
    where: str

    @property
    def fed(self) -> tuple[int, ...]:
        """Token ids alone."""
        return self.input_ids

    @property
    def targets(self) -> int:
        """Begin and end count as one thing to predict: the loss is their mean."""
        return 1

    def characters(self, begin: int, end: int) -> tuple[int, int]:
        """(begin, end) in characters of the whole context of the tokens at places `begin` to `end` inclusive of input_ids."""
        return self.offsets[begin - self.first][0], self.offsets[end - self.first][1]

    def said(self, begin: int, end: int) -> str:
        """The text of characters `begin` to `end` of the whole context."""
        shift = self.offsets[0][0]
        return self.text[begin - shift : end - shift]

    def marked(self) -> list[tuple[str, bool]]:
        """Question and text in runs, with whether they are the answer."""
        if self.span == NOWHERE:
            return [(f"{self.question} → {self.text} ", False), ("(no answer here)", True)]
        begin, end = self.characters(*self.span)
        shift = self.offsets[0][0]
        before, after = self.text[: begin - shift], self.text[end - shift :]
        return [(f"{self.question} → {before}", False), (self.said(begin, end), True), (after, False)]

    def as_dict(self) -> dict:
        """For a JSON line."""
        return asdict(self)

    @staticmethod
    def from_dict(line: dict) -> Window:
        """Undo `as_dict`."""
        pairs = tuple((begin, end) for begin, end in line["offsets"])
        begin, end = line["span"]
        changed = {"input_ids": tuple(line["input_ids"]), "span": (begin, end), "answers": tuple(line["answers"])}
        return Window(**{**line, **changed, "offsets": pairs})


def cut_windows(
    passage: Passage, where: str, tokenizer: TextTokenizer, *, max_length: int, stride: int
) -> tuple[list[Window], bool]:
    """Every window of a context, without the answer's place, and whether the question had to be cut.

    stride: tokens that neighbouring windows share, at most half of what they have room for. A question longer than half of
    max_length loses its end. Raises InputError if the tokenizer does not mark the beginning of a text.
    """
    pair = tokenizer.encode_pair(passage.question, passage.context)
    if not pair.begin or pair.input_ids[0] not in tokenizer.special_ids:
        raise InputError(
            "the model's tokenizer does not mark the beginning of a text, which stands for 'no answer'",
            where="model",
            hint="question-answering needs an encoder such as BERT",
        )
    asked = pair.begin - pair.between
    head = [*pair.input_ids[: min(asked, max_length // 2)], *pair.input_ids[asked : pair.begin]]
    tail = pair.input_ids[pair.end :]
    room = max_length - len(head) - len(tail)
    if room < 2:
        raise InputError(f"{max_length} tokens hold no question with its context", where="training.max_length")
    windows = []
    for number, (begin, end) in enumerate(_cuts(pair.end - pair.begin, room, min(stride, room // 2))):
        offsets = pair.offsets[begin:end]
        windows.append(
            Window(
                input_ids=(*head, *pair.input_ids[pair.begin + begin : pair.begin + end], *tail),
                span=NOWHERE,
                first=len(head),
                offsets=tuple(offsets),
                text=passage.context[offsets[0][0] : offsets[-1][1]] if offsets else "",
                number=number,
                question=passage.question,
                answers=passage.answers,
                where=where,
            )
        )
    return windows, len(head) < pair.begin


def _cuts(count: int, room: int, shared: int) -> list[tuple[int, int]]:
    """(begin, end) of pieces of `count` tokens, of at most `room` each, neighbours sharing `shared`; at least one piece."""
    begins = range(0, max(1, count - shared), room - shared)
    return [(begin, min(count, begin + room)) for begin in begins]


def place(window: Window, span: tuple[int, int] | None) -> Window:
    """The window with the place of the answer, whose characters `span` are; tokens that lie partly in it belong to it."""
    if span is None or not window.offsets or window.offsets[0][0] > span[0] or window.offsets[-1][1] < span[1]:
        return window
    inside = [n for n, (begin, end) in enumerate(window.offsets) if end > span[0] and begin < span[1]]
    return replace(window, span=(window.first + inside[0], window.first + inside[-1])) if inside else window


def window_all(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    *,
    max_length: int,
    stride: int,
    on_progress: OnProgress = silent,
) -> tuple[list[Window], EncodeCounts]:
    """Encode every example, the windows of one after the other. Raises InputError if one has no context, or not its answer."""
    windows: list[Window] = []
    cut = 0
    for number, example in enumerate(examples):
        if number % 100 == 0:
            on_progress(Progress("tokenize", number, len(examples), "rows"))
        if example.passage is None:
            raise InputError(
                "the rows have no context",
                where="data.format",
                hint="question-answering needs columns question, context and answers (data.format: qa)",
            )
        span = example.passage.span(example.where)
        found, shortened = cut_windows(example.passage, example.where, tokenizer, max_length=max_length, stride=stride)
        windows += [place(window, span) for window in found]
        cut += shortened
    unknown = sum(w.input_ids.count(tokenizer.unk_id) for w in windows) if tokenizer.unk_id is not None else 0
    return windows, EncodeCounts(cut, 0, unknown, sum(len(w.input_ids) for w in windows), len(windows))


def by_question(windows: Sequence[Window]) -> list[list[int]]:
    """Numbers of the windows of each question, in their order."""
    groups: list[list[int]] = []
    for place, window in enumerate(windows):
        if window.number == 0:
            groups.append([])
        groups[-1].append(place)
    return groups


def text_numbers(ids: Sequence[int], mark: int | None) -> list[int]:
    """A pair's token_type_ids: 0 up to the first `mark` and with it, then 1; all 0 if the tokenizer has no such mark."""
    first = ids.index(mark) + 1 if mark in ids else len(ids)
    return [0] * first + [1] * (len(ids) - first)
