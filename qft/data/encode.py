"""Examples → token ids with the tokens that are in the loss marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from qft.data.conversations import written_out
from qft.data.examples import Example
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.progress import OnProgress, Progress, silent

_BROKEN = "\ufffd"  # what part of a character's bytes decode to
_LEAST_SHARED = 4  # tokens of a prefix that are worth a forward pass of their own


class EncodedRow(Protocol):
    """What every prepared row has, whatever its task."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        """What the model is fed."""

    @property
    def fed(self) -> Any:
        """The row as a runner is given it: `input_ids`, or with a source before them."""

    @property
    def targets(self) -> int:
        """How many things it is asked to predict."""

    def as_dict(self) -> dict:
        """For a JSON line."""


def tokens_of(rows: Sequence[EncodedRow]) -> int:
    """All that are fed, in the loss or not."""
    return sum(len(row.input_ids) for row in rows)


@dataclass(frozen=True)
class Encoded:
    """input_ids and in_loss have one length; in_loss is True where the token is a target of the loss."""

    input_ids: tuple[int, ...]
    in_loss: tuple[bool, ...]
    answer_start: int  # index of the first token of the last answer: what comes before is the prompt
    label: str | None
    where: str

    @property
    def fed(self) -> tuple[int, ...]:
        """Token ids alone."""
        return self.input_ids

    @property
    def targets(self) -> int:
        """Tokens in the loss."""
        return sum(self.in_loss)

    @property
    def first_target(self) -> int:
        """Index of the first token in the loss."""
        return self.in_loss.index(True)

    @property
    def answers(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of each answer in the loss with its end-of-turn token; of plain text, which has none, of all but the first."""
        edges = [i for i, pair in enumerate(pairwise((False, *self.in_loss, False))) if pair[0] != pair[1]]
        return tuple(zip(edges[::2], edges[1::2], strict=True))

    @property
    def prompt(self) -> tuple[int, ...]:
        """Ids to generate the last answer from: exactly what a runtime feeds."""
        return self.input_ids[: self.answer_start]

    @property
    def answer(self) -> tuple[int, ...]:
        """The last answer's ids with its end-of-turn token, as generated (nothing after it)."""
        last = len(self.in_loss) - self.in_loss[::-1].index(True)
        return self.input_ids[self.answer_start : last]

    def as_dict(self) -> dict:
        """For a JSON line: flags as 0 and 1."""
        return {**asdict(self), "in_loss": [int(flag) for flag in self.in_loss]}

    @staticmethod
    def from_dict(line: dict) -> Encoded:
        """Undo `as_dict`."""
        return Encoded(
            tuple(line["input_ids"]),
            tuple(map(bool, line["in_loss"])),
            line["answer_start"],
            line["label"],
            line["where"],
        )


@dataclass(frozen=True)
class EncodeCounts:
    """What encoding met: rows cut by max_length, rows dropped as nothing of them was in the loss, tokens.

    shortened: rows whose prompt was made shorter so that the answer stays whole (`cut` are the others).
    """

    cut: int
    nothing_in_loss: int
    unknown_tokens: int
    tokens: int
    target_tokens: int
    shortened: int = 0


def encode_all(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    *,
    max_length: int,
    last_only: bool = False,
    on_progress: OnProgress = silent,
) -> tuple[list[Encoded], EncodeCounts]:
    """Encode every example; rows that keep no target within `max_length` are dropped and counted.

    Of a conversation that is longer the prompt is shortened (`_shortened`); only if the answer alone is too long, its end
    is lost. last_only: see `encode`. Raises InputError if no row is left.
    """
    kept: list[Encoded] = []
    cut = shortened = dropped = unknown = 0
    for number, example in enumerate(examples):
        if number % 500 == 0:
            on_progress(Progress("tokenize", number, len(examples), "rows"))
        whole = encode(example, tokenizer, last_only=last_only)
        if example.text is not None:
            pieces = _pieces(whole, max_length)
        elif len(whole.input_ids) <= max_length:
            pieces = [whole]
        elif (shorter := _shortened(example, tokenizer, max_length, last_only)) is not None:
            pieces = [shorter]
            shortened += 1
        else:
            pieces = [replace(whole, input_ids=whole.input_ids[:max_length], in_loss=whole.in_loss[:max_length])]
            cut += 1
        for encoded in pieces:
            if not any(encoded.in_loss):
                dropped += 1
                continue
            unknown += encoded.input_ids.count(tokenizer.unk_id) if tokenizer.unk_id is not None else 0
            kept.append(encoded)
    if examples and not kept:
        raise InputError(
            "no row keeps a token in the loss",
            where="training.max_length",
            hint=f"all {len(examples)} rows are longer than {max_length} tokens before their answer; raise it",
        )
    tokens, targets = tokens_of(kept), sum(sum(e.in_loss) for e in kept)
    return kept, EncodeCounts(cut, dropped, unknown, tokens, targets, shortened)


def _shortened(example: Example, tokenizer: TextTokenizer, max_length: int, last_only: bool) -> Encoded | None:
    """A conversation in at most `max_length` tokens whose last answer is whole; None if there is no room for it.

    The oldest turns go first, never the system message or tools; then the middle of the longest turn that is no answer:
    a prompt says at its beginning or at its end what is to be done.
    """
    first = int(example.messages[0].role == "system")
    begins = [i for i, message in enumerate(example.messages) if i > first and message.role == "user"]
    for begin in [first, *begins]:
        kept = replace(example, messages=(*example.messages[:first], *example.messages[begin:]))
        encoded = encode(kept, tokenizer, last_only=last_only)
        if len(encoded.input_ids) <= max_length:
            return encoded
    turns = list(kept.messages)
    longest = max(range(first, len(turns) - 1), key=lambda i: len(turns[i].content) * (turns[i].role != "assistant"))
    ids = tokenizer.encode(turns[longest].content)
    room = len(ids) - (len(encoded.input_ids) - max_length)
    while room > 0:
        ends = tokenizer.decode(ids[: room - room // 2]), tokenizer.decode(ids[len(ids) - room // 2 :])
        content = ends[0].rstrip(_BROKEN) + ends[1].lstrip(_BROKEN)
        turns[longest] = replace(turns[longest], content=content)
        encoded = encode(replace(kept, messages=tuple(turns)), tokenizer, last_only=last_only)
        if len(encoded.input_ids) <= max_length:
            return encoded
        room -= len(encoded.input_ids) - max_length  # where the ends meet, tokens are other ones
    return None


def _pieces(whole: Encoded, max_length: int) -> list[Encoded]:
    """A plain text in pieces of at most `max_length` tokens.

    Each piece begins with the last token of the one before, so that every token but the first is a target once.
    """
    ids, step = whole.input_ids, max_length - 1
    if len(ids) <= max_length:
        return [whole]
    parts = [ids[start : start + max_length] for start in range(0, len(ids) - 1, step)]
    return [
        Encoded(part, (False, *[True] * (len(part) - 1)), 1, None, f"{whole.where} piece {number}")
        for number, part in enumerate(parts, 1)
    ]


def encode(example: Example, tokenizer: TextTokenizer, *, last_only: bool = False) -> Encoded:
    """Tokenize one example.

    Prompt and answer are tokenized on their own and joined, because a runtime tokenizes the prompt alone: the ids the
    model is trained on are the ids it will see. In the loss: every assistant turn and its end-of-turn token, or (last_only)
    that of the last one.
    """
    if example.text is not None:
        return _plain_text(example, tokenizer)
    segments = _chat_segments(example, tokenizer) if tokenizer.has_chat_template else _plain_segments(example)
    ids: list[int] = []
    flags: list[bool] = []
    answer_start = 0
    for text, is_answer in segments:
        part = tokenizer.encode(text, add_special_tokens=not ids and not tokenizer.has_chat_template and not is_answer)
        if is_answer:
            answer_start = len(ids)
            part, targets = _answer_targets(part, text, tokenizer)
            flags = [flag and not last_only for flag in flags]
        else:
            targets = [False] * len(part)
        ids += part
        flags += targets
    return Encoded(tuple(ids), tuple(flags), answer_start, example.label, example.where)


def shared_prefix(rows: Sequence[Sequence[int]], *, keep: int = 1) -> int:
    """How many first tokens all rows share and a runner may therefore compute once: a template and an instruction.

    keep: the last positions of every row whose logits may be wanted; they are never in the prefix. 0 if it does not pay.
    """
    if len(rows) < 2:
        return 0
    first, last, shortest = min(map(tuple, rows)), max(map(tuple, rows)), min(map(len, rows))
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), shortest)
    same = min(same, shortest - keep)
    return same if same >= _LEAST_SHARED else 0


def _plain_text(example: Example, tokenizer: TextTokenizer) -> Encoded:
    ids = tokenizer.encode(example.text or "", add_special_tokens=True)
    if not ids or ids[-1] != tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
    # The first token has nothing before it to be predicted from.
    return Encoded(tuple(ids), (False, *[True] * (len(ids) - 1)), 1, None, example.where)


def _chat_segments(example: Example, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
    """(text, is an answer) pieces whose join is the rendered conversation up to the last answer."""
    segments: list[tuple[str, bool]] = []
    written = ""
    for index, message in enumerate(example.messages):
        if message.role != "assistant":
            continue
        before = tokenizer.render(example.messages[:index], add_generation_prompt=True, tools=example.tools)
        after = tokenizer.render(example.messages[: index + 1], add_generation_prompt=False, tools=example.tools)
        if not (before.startswith(written) and after.startswith(before)):
            raise InputError(
                "the model's chat template rewrites earlier turns, so the loss cannot be put on the answers",
                where=example.where,
                hint="use data.format: prompt-completion with one answer a row",
            )
        segments += [(before[len(written) :], False), (after[len(before) :], True)]
        written = after
    return segments


def _plain_segments(example: Example) -> list[tuple[str, bool]]:
    return [(m.content, m.role == "assistant") for m in written_out(example.messages, example.tools)]


def _answer_targets(part: list[int], text: str, tokenizer: TextTokenizer) -> tuple[list[int], list[bool]]:
    """The content and its end-of-turn token are targets; what a template writes after that (a line break) is not.

    The end is the last special token of the segment. We never mask by pad id, so pad = eos cannot hide it.
    """
    specials = [i for i, token in enumerate(part) if token in tokenizer.special_ids]
    if not specials:
        part = [*part, tokenizer.eos_id]
        return part, [True] * len(part)
    end = specials[-1]
    return part, [True] * (end + 1) + [False] * (len(part) - end - 1)
